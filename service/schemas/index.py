"""Define the JSON of the service's first address."""

from pydantic import BaseModel, Field


class IndexView(BaseModel):
    """What this service is, and the addresses of the rest."""

    name: str = Field(examples=["Text to video with Wan2.1"])
    version: str = Field(examples=["0.1.0"])
    docs: str = Field(description="The description of the API as a page.")
    openapi: str = Field(description="The same as an OpenAPI document.")
    models: str = Field(description="What can be asked for.")
    health: str = Field(description="Whether the process is alive.")

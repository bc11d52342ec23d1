"""Define the RFC 9457 problem document that describes an error to the caller."""

from typing import Any

from pydantic import BaseModel, Field


class FieldProblem(BaseModel):
    """A field that was refused."""

    field: str
    value: Any = Field(description="What was sent; long texts are cut.")
    bound: str = Field(description="What would be accepted.")
    detail: str


class ServedModel(BaseModel):
    """A model that is served now, and its modes."""

    model: str
    modes: list[str]


class Problem(BaseModel):
    """An RFC 9457 problem document; members that do not apply are left out."""

    type: str = Field(examples=["urn:wan-hif8:problem:job_not_found"])
    title: str = Field(examples=["No such job"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no job 01a2039b8ee8."])
    instance: str = Field(description="The path that was asked for.", examples=["/jobs/01a2"])
    code: str = Field(description="Stable, for programs.", examples=["job_not_found"])
    job_id: str | None = None
    state: str | None = Field(default=None, description="The state the job is in.")
    retry_after_s: int | None = Field(default=None, description="After how many seconds to retry.")
    errors: list[FieldProblem] | None = Field(default=None, description="Every refused field.")
    served: list[ServedModel] | None = Field(default=None, description="What is served now.")

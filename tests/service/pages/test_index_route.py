"""Test what a program finds at the service's first address."""

from importlib.metadata import version

from fastapi.testclient import TestClient


def test_the_index_leads_to_addresses_that_answer(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    index = answer.json()
    assert index.pop("name") == "Text to video with Wan2.1"
    assert index.pop("version") == version("wan-hif8")
    assert sorted(index) == ["docs", "health", "models", "openapi"]
    for address in index.values():
        assert address.startswith("http://testserver/")
        assert client.get(address).status_code == 200, address


def test_the_index_takes_no_parameters(client: TestClient) -> None:
    assert client.get("/?prompt=x").json()["code"] == "invalid_spec"
    assert client.head("/").status_code == 200

"""Test that addresses are pages for browsers and JSON for programs."""

import re

import pytest
from fastapi.testclient import TestClient

from service.pages.page_routes import OWN_PAGES, SHARED_PAGES

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PROGRAMS = ["", "*/*", "application/json", "application/json, text/html;q=0.9"]


def example(path: str) -> str:
    return re.sub(r"{\w+}", "01a2039b8ee84d074d36452736a1b6c7", path)


@pytest.mark.parametrize("path", [*SHARED_PAGES, *OWN_PAGES])
def test_browsers_get_a_page_whose_files_exist(client: TestClient, path: str) -> None:
    answer = client.get(example(path), headers=BROWSER)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=", answer.text), "no inline code"
    here = client.base_url.join(example(path))
    files = re.findall(r'(?:src|href)="([^"#]*(?:static|favicon)[^"]*)"', answer.text)
    assert len(files) >= 4
    for file in files:
        assert not file.startswith("/"), "a proxy may add a prefix"
        assert client.get(str(here.join(file))).status_code == 200, file


@pytest.mark.parametrize("accept", PROGRAMS)
def test_programs_get_no_page_at_shared_addresses(client: TestClient, accept: str) -> None:
    for path in SHARED_PAGES:
        answer = client.get(example(path), headers={"Accept": accept})
        assert "json" in answer.headers["content-type"], path
        assert "Accept" in answer.headers["vary"], path


def test_both_forms_name_what_they_were_chosen_by(client: TestClient) -> None:
    page = client.get("/", headers=BROWSER)
    assert set(page.headers["vary"].split(", ")) == {"Accept", "Accept-Encoding"}
    again = client.get("/", headers=BROWSER | {"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_other_methods_are_the_apis(client: TestClient) -> None:
    job = example("/jobs/{job_id}")
    assert client.delete(job, headers=BROWSER).json()["code"] == "job_not_found"
    answer = client.put(job, headers=BROWSER)
    assert (answer.status_code, answer.headers["content-type"]) == (405, "application/problem+json")
    assert set(answer.headers["allow"].split(", ")) == {"DELETE", "GET", "HEAD"}

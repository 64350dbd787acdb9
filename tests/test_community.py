"""Files for contributors and services: they parse, and what they name exists."""

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict:
    content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # else `on` would be True
    assert isinstance(content, dict)
    return content


def project(key: str) -> str:
    """A text of pyproject.toml, whose parser Python 3.10 lacks."""
    found = re.search(rf'^{key} = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_are_those_that_github_shows(form: Path) -> None:
    content = read(form)
    assert {"name", "description", "body"} <= content.keys()
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") == "true" for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
        assert field["type"] != "dropdown" or len(set(field["attributes"]["options"])) > 1


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_bounds_and_pinned_actions(workflow: Path) -> None:
    content = read(workflow)
    assert {"name", "on", "jobs"} <= content.keys()
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert int(job["timeout-minutes"]) <= 120
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step["uses"])


def test_ci_runs_the_whole_check_on_the_oldest_python() -> None:
    job = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["check"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert project("requires-python") == f">={job['strategy']['matrix']['python'][0]}"


def test_only_the_tag_of_the_version_is_published() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    steps = jobs["build"]["steps"]
    check = next(step["run"] for step in steps if "GITHUB_REF_NAME" in step.get("run", ""))
    pattern = re.search(r"s/(.*)/\\1/p", check)
    assert pattern is not None
    found = re.findall(pattern[1].replace(r"\(", "(").replace(r"\)", ")"), (ROOT / "pyproject.toml").read_text(), re.M)
    assert found == [project("version")]
    commands = [step.get("run", "") for step in steps]
    assert commands.index("python -m build") < commands.index("twine check --strict dist/*")
    publish = jobs["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}  # and no secret
    assert not any("password" in str(step) for step in publish["steps"])


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (project("version"), project("license"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()


PAGES = ("CODE_OF_CONDUCT.md", "SECURITY.md", "CONTRIBUTING.md", ".github/pull_request_template.md")


@pytest.mark.parametrize("name", PAGES)
def test_pages_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), target
    for file in re.findall(r"`((?:docs/|\.ci/)?[\w.]+(?:\.md|/run))`", text):
        assert (ROOT / file).exists(), file

"""The table of runs: read as it is meant, and every mistake named."""

import datetime
import json

import pytest
from tiny_project import Project, quick_profile

from spear.figures.table import PROFILES, load, parameters


def test_profiles_override_the_notebook(project: Project) -> None:
    project.add("00_tiny", profiles={"quick": {"count": 1}, "paper": {"text": "b", "names": []}, "test": {"rate": 2}})
    quick, paper, test = (load(project.table, profile)[0] for profile in PROFILES)
    assert (quick.parameters, paper.parameters, test.parameters) == (
        {"count": 1},
        {"text": "b", "names": []},
        {"rate": 2},
    )
    assert quick.files == ("00_tiny-plot.csv", "00_tiny-plot.png")
    assert quick.notebook == project.notebook("00_tiny")
    assert parameters(quick.notebook)["names"] == ["x", "y"]


def test_another_profile_or_data_set_has_folders_of_its_own(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", parameters="dataset = 'photos'\ncount = 1")
    quick, paper = (load(project.table, profile) for profile in ("quick", "paper"))
    assert [run.variant for run in (*quick, *paper)] == ["", "", "paper", "paper"]
    (chosen,) = load(project.table, "quick", "digits")
    assert (chosen.name, chosen.parameters, chosen.variant) == ("01_tiny", {"dataset": "digits"}, "quick/digits")
    assert load(project.table, "paper", "digits")[0].variant == "paper/digits"


def test_an_entry_of_several_data_sets_is_a_run_for_each_at_full_size_only(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", parameters="dataset = 'photos'\ncount = 1", datasets=["mnist", "digits"])
    assert [run.label for run in load(project.table, "quick")] == ["00_tiny", "01_tiny"]
    paper = load(project.table, "paper")
    assert [run.label for run in paper] == ["00_tiny", "01_tiny on mnist", "01_tiny on digits"]
    assert [run.parameters for run in paper[1:]] == [{"dataset": "mnist"}, {"dataset": "digits"}]
    places = [place for run in paper for place in (run.folder, run.work, run.record)]
    assert len({*places}) == len(places)
    assert [run.label for run in load(project.table, "paper", "photos")] == ["01_tiny on photos"]


def test_no_notebook_with_a_data_set_to_choose_is_an_error(project: Project) -> None:
    project.add("00_tiny")
    with pytest.raises(ValueError, match="runs.yaml: no notebook has a parameter 'dataset'"):
        load(project.table, "quick", "digits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"notebook": "09_none.ipynb"}, "run '00_tiny': unknown notebook '09_none.ipynb'"),
        (quick_profile(counts=3), "profile 'quick': 00_tiny.ipynb has no parameter 'counts'"),
        (quick_profile(rate="1e-3"), "rate is '1e-3', in 00_tiny.ipynb 0.5"),
        (quick_profile(count=True), "count is True, in 00_tiny.ipynb 3"),
        (quick_profile(text=None), "text is None, in 00_tiny.ipynb 'a'"),
        ({"timeout": 3}, "run '00_tiny': unknown key 'timeout'"),
        ({"profiles": {"quick": {}, "paper": {}, "test": {}, "slow": {}}}, "unknown profile 'slow'"),
        ({"profiles": {"quick": {}, "paper": {}}}, "profile 'test' is missing"),
        ({"profiles": {"quick": None, "paper": {}, "test": {}}}, "profile 'quick' is not a mapping"),
        ({"profiles": []}, "profiles is not a mapping"),
        ({"writes": ["00_tiny-plot"]}, "writes is not a mapping of figures to captions"),
        ({"writes": {"00_tiny-plot": " "}}, "figure '00_tiny-plot' has no caption"),
        ({"writes": {"00_tiny-plot": None}}, "figure '00_tiny-plot' has no caption"),
        ({"writes": {"plot": "A picture."}}, "figure 'plot' is not named '00_tiny-...' after its notebook"),
        ({"name": "../tiny"}, "run '../tiny': a name is text made of letters"),
        ({"name": 12}, "run 12: a name is text made of letters"),
        ({"name": datetime.date(2024, 1, 1)}, "a name is text made of letters"),
        ({"name": None}, "run None: a name is text made of letters"),
        ({"notebook": ["00_tiny.ipynb"]}, "notebook ['00_tiny.ipynb'] is no file name"),
        ({"writes": {"00_tiny-/../../x": "A picture."}}, "the name of a figure is text made of letters"),
        ({"datasets": "mnist"}, "run '00_tiny': datasets is not a list of names"),
        ({"datasets": [3]}, "datasets is not a list of names"),
        ({"datasets": ["mnist"]}, "datasets are given, but 00_tiny.ipynb has no parameter 'dataset'"),
        ({"writes": {7: "A picture."}}, "the name of a figure is text made of letters"),
    ],
)
def test_a_wrong_entry_is_named(project: Project, changes: dict, message: str) -> None:
    project.add("00_tiny", **changes)
    with pytest.raises(ValueError, match="runs.yaml") as caught:
        project.load()
    assert message in str(caught.value)


def test_every_profile_is_checked_not_only_the_chosen(project: Project) -> None:
    project.add("00_tiny", profiles={"quick": {}, "paper": {"counts": 1}, "test": {}})
    with pytest.raises(ValueError, match="profile 'paper': 00_tiny.ipynb has no parameter 'counts'"):
        project.load()


def test_a_run_name_twice_is_an_error(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", name="00_tiny")
    with pytest.raises(ValueError, match="run name '00_tiny' appears twice"):
        project.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of runs"),
        ("name: x", "not a list of runs"),
        ("- 3", "3 is not a run"),
        ("- {name: x, notebook: x.ipynb, profiles: {}}", "run 'x': key 'writes' is missing"),
        ("- {name: x, name: y}", "a key is given twice"),
        ("- [", "while parsing"),
    ],
)
def test_a_file_that_is_no_table_is_named(project: Project, text: str, message: str) -> None:
    project.table.write_text(text)
    with pytest.raises(ValueError, match="runs.yaml") as caught:
        project.load()
    assert message in str(caught.value)


def test_no_table_and_no_profile(project: Project) -> None:
    with pytest.raises(FileNotFoundError, match="runs.yaml: no such file"):
        project.load()
    with pytest.raises(ValueError, match="unknown profile 'slow': use one of quick, paper, test"):
        load(project.table, "slow")


CELL = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = 0", "outputs": []}


@pytest.mark.parametrize(
    "notebook",
    [
        [],
        {"nbformat": 3},
        {"cells": 5},
        {"cells": [7]},
        {"cells": [CELL | {"metadata": []}]},
        {"cells": [CELL | {"metadata": {"tags": 5}}]},
        {"cells": [CELL | {"source": [1]}]},
        {"cells": [CELL | {"outputs": None}]},
        {"cells": [CELL | {"source": "seed ="}]},
        {"cells": [CELL | {"source": "seed = {[]: 1}"}]},
    ],
)
def test_a_notebook_that_is_none_is_named(project: Project, notebook: object) -> None:
    project.add("00_tiny")
    project.notebook("00_tiny").write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="00_tiny.ipynb: ") as caught:
        project.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["count: int = 3", "count = 2 * n", "count, n = 1, 2", "import os", "count = len([])"])
def test_parameters_are_plain_assignments_of_literals(project: Project, line: str) -> None:
    project.add("00_tiny", parameters=line)
    with pytest.raises(ValueError, match="is not a plain assignment of a literal"):
        project.load()

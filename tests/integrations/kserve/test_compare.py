"""The initializer beside the old program: what is put into each destination, and how it ends.

Where the table says that the old program is right, both are run and agree with it. Where it says
that the old one is wrong, the old one is run too, so that the claim is proved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import NamedTuple

import pytest

from tests.integrations.kserve.case import Case, Failed, Files, Wrong
from tests.integrations.kserve.cases import CASES
from tests.integrations.kserve.places import Place
from tests.integrations.kserve.side import (
    KSERVE_STORAGE,
    Initializer,
    Outcome,
    old_program,
    this_library,
)
from tests.integrations.kserve.stores import Stores, stores
from tests.servers.process import ServerError

NOBODY = 65534
_SECRET = re.compile(
    r"SECRET_ACCESS_KEY|SESSION_TOKEN|ACCESS_TOKEN|STORAGE_ACCESS_KEY|HF_TOKEN$|CLIENT_SECRET"
)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Initializer]:
    """The program of KServe's image."""
    try:
        KSERVE_STORAGE.python()
    except ServerError as exc:
        pytest.fail(f"{KSERVE_STORAGE.requirement} cannot be installed: {exc}", pytrace=False)
    with old_program(tmp_path_factory.mktemp("old")) as program:
        yield program


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Initializer]:
    """This library's program."""
    with this_library(tmp_path_factory.mktemp("ours")) as program:
        yield program


@pytest.fixture(scope="module")
def the_stores(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Stores]:
    """Where the models of the cases are."""
    with stores(tmp_path_factory.mktemp("stores"), request) as found:
        yield found


class Prepared(NamedTuple):
    """A case whose files are where it says."""

    case: Case
    place: Place
    earlier: Place | None
    names: dict[str, str]

    def run(self, program: Initializer, user: int | None = None) -> Outcome:
        """Run one of the programs, after the run before if the case has one."""
        folder = program.folder()
        dest = self.case.dest or str(folder / "dest")
        places = {"dest": dest, "dest2": str(folder / "dest2")}
        for path, content in self.case.there.items():
            file = Path(dest, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if self.earlier is not None:
            outcome = self._run(program, self.earlier, places, folder, user)
            assert outcome.status == 0, outcome.printed
        return self._run(program, self.place, places, folder, user)

    def _run(
        self,
        program: Initializer,
        place: Place,
        places: dict[str, str],
        folder: Path,
        user: int | None,
    ) -> Outcome:
        names = {**self.names, **place.names, **places, "root": place.root}
        arguments = [Template(argument).substitute(names) for argument in self.case.arguments]
        variables = self.environment(names, place)
        destinations = list(places.values())
        return program.run(arguments, variables, destinations, folder=folder, user=user)

    def environment(self, names: dict[str, str], place: Place) -> dict[str, str]:
        """Return the variables of the case and those that lead to its store."""
        variables: dict[str, str] = dict(place.environment)
        for name, template in self.case.variables.items():
            if template is None:
                variables.pop(name, None)
            else:
                variables[name] = Template(template).substitute(names)
        return variables


def _prepared(case: Case, where: Stores, *programs: Initializer) -> Prepared:
    claims = [program.claim for program in programs]

    def put(name: str, files: Files) -> Place:
        return where.place(case.store, name, files, claims)

    place = put(case.name, case.files)
    earlier = None if case.earlier is None else put(f"{case.name}-before", case.earlier)
    return Prepared(case, place, earlier, where.common())


def _agrees(outcome: Outcome, case: Case) -> None:
    """Assert that a run left what the case says."""
    if isinstance(case.tree, Failed):
        assert outcome.status == 1, outcome.printed
    else:
        assert outcome.status == 0, outcome.printed
        assert outcome.trees[0] == case.tree, outcome.printed
    if case.also is not None:
        assert (outcome.trees[1] or {}) == case.also, outcome.printed


def _is_as_wrong(outcome: Outcome, wrong: Wrong) -> None:
    """Assert that the old program did what the table says that it does wrong."""
    if wrong.leaves is None:
        assert outcome.status == 1, outcome.printed
    else:
        assert outcome.status == 0, outcome.printed
        assert outcome.trees[0] in (wrong.leaves, wrong.perhaps), outcome.printed


def _is_clean(outcome: Outcome, prepared: Prepared) -> None:
    """Assert what our program owes beyond the old one's."""
    case, place = prepared.case, prepared.place
    names = {**prepared.names, **place.names, "root": place.root, "dest": "", "dest2": ""}
    if isinstance(case.tree, Failed):
        said = Template(case.tree.says.replace("$)", "$$)")).substitute(names)
        assert re.search(said, outcome.printed, re.IGNORECASE), outcome.printed
        assert (outcome.trees[0] or {}) == case.there, "something was left"
        if "Usage" not in outcome.out:
            errors = [line for line in outcome.err.splitlines() if ": error: " in line]
            assert errors == outcome.err.splitlines()[-1:], "one line is enough"
    assert "Usage" in outcome.out or not outcome.out, "what is said is for the log"
    assert "Traceback" not in outcome.printed, outcome.printed
    assert "unexpected" not in outcome.err, "an error of an SDK escaped"
    for name, value in prepared.environment(names, place).items():
        assert not (_SECRET.search(name) and value in outcome.printed), outcome.printed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_initializers_do_what_the_table_says(
    case: Case, old: Initializer, ours: Initializer, the_stores: Stores
) -> None:
    """The old one where it is right, and as wrong as the table says where it is not."""
    prepared = _prepared(case, the_stores, old, ours)
    try:
        programs = (ours,) if case.old is not None and case.old.endless else (ours, old)
        # Each waits for stores most of the time.
        with ThreadPoolExecutor(2) as pool:
            outcome, *before = pool.map(prepared.run, programs)
        for of_old in before:
            if case.old is None:
                _agrees(of_old, case)
            else:
                _is_as_wrong(of_old, case.old)
        _agrees(outcome, case)
        _is_clean(outcome, prepared)
    finally:
        old.empty()
        ours.empty()


@pytest.mark.parametrize("store", ["s3", "gcs", "azure", "http", "hf", "local", "claim"])
def test_a_user_without_rights_and_without_a_home_gets_the_same(
    store: str, ours: Initializer, the_stores: Stores
) -> None:
    """As in a pod that runs as nobody, on a read-only root file system."""
    file = {"model.bin": b"weights"}
    arguments = ("$root/model.bin" if store == "http" else "$root", "$dest")
    case = Case(f"nobody-{store}", store, file, file, arguments, dest="/mnt/models")
    prepared = _prepared(case, the_stores, ours)
    ours.models.chmod(0o777)
    try:
        outcome = prepared.run(ours, user=NOBODY)
        _agrees(outcome, case)
        if not os.getuid():
            owners = {path.lstat().st_uid for path in ours.models.iterdir()}
            assert owners == {NOBODY}, outcome.printed
    finally:
        ours.empty()


def test_the_table_is_long_and_every_case_has_a_name_of_its_own() -> None:
    """The comparison is worth its name."""
    compared = [case for case in CASES if case.old is None or not case.old.endless]
    assert len(compared) >= 250
    assert sum(case.old is None for case in compared) >= 60
    assert len({case.name for case in CASES}) == len(CASES)

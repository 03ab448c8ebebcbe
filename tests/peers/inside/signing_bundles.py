"""The side of ``model-signing``: its API, and its command run as its own process."""

import subprocess
import sys
from pathlib import Path

import model_signing
from json_lines import serve


def _hashing(signature, ignore=(), allow_symlinks=False):
    hashing = model_signing.hashing.Config()
    hashing.set_ignored_paths(paths=[signature, *ignore])
    return hashing.set_allow_symlinks(allow_symlinks)


def sign(tree, signature, key, certificate=None, chain=(), allow_symlinks=False):
    """Sign a tree with the API."""
    config = model_signing.signing.Config()
    if certificate is None:
        config.use_elliptic_key_signer(private_key=Path(key))
    else:
        config.use_certificate_signer(
            private_key=Path(key),
            signing_certificate=Path(certificate),
            certificate_chain=[Path(path) for path in chain],
        )
    config.set_hashing_config(_hashing(Path(signature), allow_symlinks=allow_symlinks))
    config.sign(Path(tree), Path(signature))


def verify(tree, signature, key=None, chain=(), allow_symlinks=False):
    """Verify a tree with the API; what is wrong is raised."""
    config = model_signing.verifying.Config()
    if key is not None:
        config.use_elliptic_key_verifier(public_key=Path(key))
    else:
        config.use_certificate_verifier(certificate_chain=[Path(path) for path in chain])
    config.set_hashing_config(_hashing(Path(signature), allow_symlinks=allow_symlinks))
    config.verify(Path(tree), Path(signature))


def command(*, arguments):
    """Run the command; return its status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *arguments], capture_output=True, text=True
    )
    return [done.returncode, done.stdout + done.stderr]


serve({"command": command, "sign": sign, "verify": verify})

"""``storage container …``: making, opening and signing model containers."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from storage.cli.commands import store_config
from storage.cli.output import Output, human_size, new_file
from storage.client import StorageClient
from storage.container import ModelContainer, ModelContainerBuilder, get_helper
from storage.container.entries import STORED
from storage.container.signatures.signing import (
    is_ed25519,
    load_private_key,
    load_public_key,
    read_signature,
    read_small,
)
from storage.errors import InvalidInput, SignatureError, UnsupportedOperation
from storage.uri import parse_uri

__all__ = ["run"]

_BLOCK = 1024 * 1024
_MAX_SIGNATURE = 64 * 1024
_MAX_PASSWORD = 64 * 1024
# What the field writes under these names.
_HELPERS = {".npz": "numpyhelper", ".safetensors": "safetensors"}


def run(args: Namespace, output: Output) -> None:
    """Run the command below ``storage container`` that ``args`` names.

    Raises:
        StorageError: it failed, or a signature is not right.
        ReaderGoneError: nobody reads its result.
    """
    with StorageClient() as client:
        _COMMANDS[args.container_command](client, args, output)


def _opened(client: StorageClient, args: Namespace) -> ModelContainer:
    config = store_config(client, args.config)
    return ModelContainer.open(args.src, config=config, client=client, cache=args.cache)


# -- making ----------------------------------------------------------------------------------


class _AsItIs:
    """A helper for parameters that somebody has written to a file already."""

    streams = True

    def __init__(self, name: str) -> None:
        self.name = name
        # One that is not installed here may be where the container is read.
        with suppress(UnsupportedOperation):
            if noted := getattr(get_helper(name), "training_model_format", None):
                self.training_model_format = noted

    def save(self, params: BinaryIO, stream: BinaryIO) -> None:
        shutil.copyfileobj(params, stream, _BLOCK)

    def load(self, stream: BinaryIO) -> BinaryIO:
        return stream


def _build(client: StorageClient, args: Namespace, output: Output) -> None:
    out = parse_uri(args.out)
    for part in (args.training, args.inference):
        if part is not None and _is_same(client, part, args.out):
            raise InvalidInput(f"{part} would be replaced by the container that it goes into")
    if out.forces_tree:
        raise InvalidInput(f"{out} names a tree; a container is one object")
    with ExitStack() as stack:
        builder = stack.enter_context(_builder(client, args))
        if args.training is not None and (helper := _helper(args)):
            builder.set_training_model(_reading(stack, args.training), _AsItIs(helper))
        if args.inference is not None:
            builder.set_inference_model_stream(_reading(stack, args.inference), args.format)
        builder.set_metadata_dict(dict(args.meta or ()))
        if args.id is not None:
            builder.set_model_id(args.id)
        config = store_config(client, args.dest_config)
        if config is None and (args.src is None or parse_uri(args.src).type == out.type):
            config = store_config(client, args.config)
        path = client.backend(out, config).local_path(out.key) if out.is_local else None
        folder = os.path.dirname(path) if path else stack.enter_context(TemporaryDirectory())
        container = stack.enter_context(builder.build(dir=folder))
        if path:
            container.save_to_file(path)
        else:
            packed = os.path.join(folder, "container")
            container.save_to_file(packed)
            with output.reporter() as reporter:
                client.upload(packed, args.out, config=config, progress=reporter)
        model_id, size = container.model_id, container.size
    output.note(f"built {out}: {human_size(size)}, model {model_id}")
    output.result({"uri": str(out), "model_id": model_id, "size": size}, [str(out)])


def _builder(client: StorageClient, args: Namespace) -> ModelContainerBuilder:
    """Return a builder with what is taken over from another container, or from a bare model."""
    if args.training is not None and ModelContainer.detect_format_file(args.training) == "zip":
        raise InvalidInput(f"{args.training} is a container; --from takes over what it holds")
    if args.src is not None:
        with _opened(client, args) as container:
            if args.training is not None and not _helper(args):
                raise InvalidInput(
                    f"nothing tells what reads {args.training}; name it by --helper, for what "
                    "reads the training model that it replaces may not"
                )
            return container.to_builder()
    if args.training is not None and not _helper(args):
        return ModelContainerBuilder.from_file(args.training)
    return ModelContainerBuilder()


def _helper(args: Namespace) -> str | None:
    """Return the name of what reads the training model; ``None`` if nothing tells."""
    helper: str | None = args.helper
    return helper or _HELPERS.get(os.path.splitext(args.training)[1].lower())


def _is_same(client: StorageClient, path: str, uri: str) -> bool:
    """Tell whether a path is of the very file that a URI, or another path, names."""
    location = parse_uri(uri)
    other = client.backend(location).local_path(location.key) if location.is_local else None
    try:
        return other is not None and os.path.samefile(path, other)
    except OSError:
        return False


def _reading(stack: ExitStack, path: str) -> BinaryIO:
    try:
        return stack.enter_context(open(path, "rb"))
    except OSError as exc:
        raise InvalidInput(f"{path} cannot be read: {exc.strerror}") from exc


# -- looking ---------------------------------------------------------------------------------


def _inspect(client: StorageClient, args: Namespace, output: Output) -> None:
    with _opened(client, args) as container:
        entries = [
            {
                "name": entry.name,
                "size": entry.size,
                "stored_size": entry.compressed_size,
                "method": "stored" if entry.method == STORED else "deflated",
            }
            for entry in container.entries.values()
        ]
        document: dict[str, Any] = {
            "uri": str(parse_uri(args.src)),
            "model_id": container.model_id,
            "size": container.size,
            "format_version": container.format_version,
            "legacy": container.legacy_source,
            "metadata": container.metadata,
            "entries": entries,
        }
        if args.checksum:
            document["checksum"] = container.checksum
    output.result(document, _inspect_lines(document))


def _inspect_lines(document: dict[str, Any]) -> Iterator[str]:
    for name, value in document.items():
        if name == "metadata":
            for key, item in value.items():
                text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
                yield f"metadata.{key}: {text}"
        elif name == "entries":
            width = max((len(str(entry["size"])) for entry in value), default=0)
            for entry in value:
                yield f"{entry['size']:>{width}}  {entry['method']:<8}  {entry['name']}"
        elif value is not None:
            yield f"{name}: {json.dumps(value) if isinstance(value, bool) else value}"


def _extract(client: StorageClient, args: Namespace, output: Output) -> None:
    with _opened(client, args) as container, _part(container, args.part) as stream:
        if args.dest == "-":
            while block := stream.read(_BLOCK):
                output.write(block)
            return
        dest = args.dest
        if dest.endswith("/") or os.path.isdir(dest):
            dest = os.path.join(dest, _NAMES.get(args.part) or args.part.partition("/")[2])
        if _is_same(client, dest, args.src):
            raise InvalidInput(f"{dest} is the container itself; choose another destination")
        with new_file(dest) as file:
            shutil.copyfileobj(stream, file, _BLOCK)
            size = file.tell()
    output.note(f"extracted {human_size(size)} to {dest}")
    output.result({"path": dest, "size": size}, [dest])


_NAMES = {"training": "training_model.bin", "inference": "inference_model.bin"}


def _part(container: ModelContainer, part: str) -> AbstractContextManager[BinaryIO]:
    if part == "training":
        return container.get_training_model_stream()
    if part == "inference":
        return container.get_inference_model_stream()
    return container.open_file(part.partition("/")[2])


# -- signatures ------------------------------------------------------------------------------


def _sign(client: StorageClient, args: Namespace, output: Output) -> None:
    password = None
    if args.password_file is not None:
        lines = read_small(args.password_file, _MAX_PASSWORD, "a password")
        password = lines.split(b"\n", 1)[0].removesuffix(b"\r")
    key = load_private_key(args.key, password)
    if args.certificate is not None or not is_ed25519(key):
        from storage.container.signatures.bundles import sign_tree

        if args.signer is not None:
            raise InvalidInput(
                "--signer is for containers, which Ed25519 keys sign; a bundle has no room for it"
            )
        written = sign_tree(
            _here(client, args),
            args.out,
            key=key,
            certificate=args.certificate,
            certificate_chain=args.chain or (),
            ignore=args.ignore or (),
        )
        output.note(f"signed {args.src}")
        output.result({"path": written}, [written])
        return
    if args.out is not None and os.path.isfile(args.out):
        data = read_small(args.out, _MAX_SIGNATURE, "a signature")
        if read_signature(data) is None:
            raise InvalidInput(f"{args.out} is there and is no signature; choose another file")
    with _opened(client, args) as container:
        signature = container.sign(key, args.signer)
    text = json.dumps(signature)
    if args.out is None:
        output.result(signature, [text])
        return
    with new_file(args.out) as file:
        file.write(f"{text}\n".encode())
    output.note(f"signed {parse_uri(args.src)}")
    output.result({"path": args.out}, [args.out])


def _verify(client: StorageClient, args: Namespace, output: Output) -> None:
    key = None if args.key is None else load_public_key(args.key)
    if key is None or not is_ed25519(key):
        from storage.container.signatures.bundles import verify_tree

        path = _here(client, args)
        verify_tree(
            path,
            args.signature,
            key=key,
            certificate_chain=args.root or (),
            ignore=args.ignore or (),
        )
        output.note(f"the signature of {args.src} is right")
        output.result({"ok": True, "uri": path})
        return
    if args.signature is None:
        raise InvalidInput("a container's signature is beside it; --signature is missing")
    signature = _signature(args.signature)
    with _opened(client, args) as container:
        model_id = container.model_id
        if not container.verify_signature(key, signature):
            raise SignatureError(
                f"{parse_uri(args.src)}: the signature is not of this container by the owner of "
                f"{args.key}"
            )
    output.note(f"the signature of {parse_uri(args.src)} is right")
    output.result({"ok": True, "uri": str(parse_uri(args.src)), "model_id": model_id})


def _signature(text: str) -> dict[str, object]:
    """Return a signature that a file holds, or that is given as base64."""
    data = text.encode("utf-8", "surrogateescape")
    if os.path.exists(text):
        data = read_small(text, _MAX_SIGNATURE, "a signature")
    found = read_signature(data)
    if found is None:
        raise InvalidInput(
            "--signature is neither the signature of a container nor a file that holds one; "
            "expected what `storage container sign` wrote"
        )
    return found


def _here(client: StorageClient, args: Namespace) -> str:
    """Return the path of what is signed by a bundle."""
    location = parse_uri(args.src)
    if not location.is_local:
        raise InvalidInput(
            f"{location}: a bundle signs a folder or a file of this machine; "
            "storage download brings it here"
        )
    config = store_config(client, args.config)
    # It is signed, or verified, right now.
    return client.download(args.src, config=config, require_signature=False)


_COMMANDS: dict[str, Callable[[StorageClient, Namespace, Output], None]] = {
    "build": _build,
    "inspect": _inspect,
    "extract": _extract,
    "sign": _sign,
    "verify": _verify,
}

"""The cases of the comparison whose models are in repositories: Hubs, registries of images, git."""

from __future__ import annotations

from collections.abc import Mapping

from tests.integrations.kserve.case import MODEL, Case, Failed, Wrong, zipped

TYPES = {"a.safetensors": b"1", "b.bin": b"2", "notes/c.json": b"3"}
TOKEN = {"HF_TOKEN": "$token"}
DENIED = "denied|refused|authenti|permission|private|token"
SECURE: Mapping[str, str | None] = {"KSERVE_OCI_INSECURE_REGISTRY": None}

HUB = [
    Case("hf-model", "hf", MODEL, MODEL),
    Case("hf-branch", "hf", {**MODEL, "v1:old.bin": b"1"}, {"old.bin": b"1"},
         ("$root:v1", "$dest")),
    Case("hf-tag", "hf", {**MODEL, "v1:old.bin": b"1"}, {"old.bin": b"1"},
         ("$root:1.0", "$dest")),
    Case("hf-commit", "hf", {**MODEL, "v1:old.bin": b"1"}, {"old.bin": b"1"},
         ("$root:$commit", "$dest")),
    Case("hf-pull-request", "hf", {**MODEL, "v1:old.bin": b"1"}, {"old.bin": b"1"},
         ("$root:refs/pr/1", "$dest"), old=Wrong("the slashes are taken for the path's")),
    Case("hf-folder-of-a-model", "hf", MODEL, {"part-1.bin": MODEL["weights/part-1.bin"]},
         ("$root/weights", "$dest"), old=Wrong("two parts are demanded")),
    Case("hf-without-an-owner", "hf_short", MODEL, MODEL, old=Wrong("two parts are demanded")),
    Case("hf-missing", "hf", MODEL, Failed("nothing"), ("hf://owner/nothing", "$dest")),
    Case("hf-missing-revision", "hf", MODEL, Failed("v9"), ("$root:v9", "$dest")),
    Case("hf-no-model", "hf", MODEL, Failed("hf://"), ("hf://owner/", "$dest")),
    Case("hf-private", "hf_private", MODEL, MODEL, variables=TOKEN),
    Case("hf-old-name-of-the-token", "hf_private", MODEL, MODEL,
         variables={"HUGGING_FACE_HUB_TOKEN": "$token"}),
    Case("hf-token-in-a-file", "hf_private", MODEL, MODEL,
         variables={"HF_TOKEN_PATH": "$token_file"}),
    Case("hf-offline-and-never-cached", "hf", MODEL, Failed("offline"),
         variables={"HF_HUB_OFFLINE": "1"}),
    Case("hf-private-without-a-token", "hf_private", MODEL, Failed(DENIED)),
    Case("hf-wrong-token", "hf_private", MODEL, Failed(DENIED),
         variables={"HF_TOKEN": "hf_wrong"}),
    Case("hf-allow", "hf", TYPES, {"a.safetensors": b"1", "notes/c.json": b"3"},
         variables={"STORAGE_ALLOW_PATTERNS": "*.safetensors,*.json"}),
    Case("hf-ignore", "hf", TYPES, {"a.safetensors": b"1", "b.bin": b"2"},
         variables={"STORAGE_IGNORE_PATTERNS": "notes/*"}),
    Case("hf-nothing-allowed", "hf", TYPES, Failed("pattern"),
         variables={"STORAGE_ALLOW_PATTERNS": "*.onnx"},
         old=Wrong("it reports success with nothing", {})),
    Case("hf-archives-stay", "hf", {"m.zip": zipped(MODEL), "a.txt": b"1"},
         {"m.zip": zipped(MODEL), "a.txt": b"1"}),
    Case("hf-one-archive-stays", "hf", {"m.zip": zipped(MODEL)}, {"m.zip": zipped(MODEL)}),
    Case("hf-unreachable", "hf", MODEL, Failed("127.0.0.1|reach|connect"),
         variables={"HF_ENDPOINT": "http://127.0.0.1:$closed"}),
    Case("hf-second-version", "hf", {"a.bin": b"2"}, {"a.bin": b"2"},
         earlier={"a.bin": b"1", "old.bin": b"0"},
         old=Wrong("files of the first version stay", {"a.bin": b"2", "old.bin": b"0"})),
]  # fmt: skip

IMAGES = [
    Case("oci-image", "oci", MODEL, MODEL),
    Case("oci-digest", "oci", MODEL, MODEL, ("$digest", "$dest")),
    Case("oci-uncompressed-layer", "oci_plain", MODEL, MODEL),
    Case("oci-zstd-layer", "oci_zstd", MODEL, MODEL, old=Wrong("zstd is refused")),
    Case("oci-no-models-folder", "oci_root", MODEL, Failed("/models")),
    Case("oci-two-layers", "oci_layers", {"a": b"2", "b": b"1"}, {"a": b"2", "b": b"1"}),
    Case("oci-removed-by-a-layer", "oci_whiteout", {"a": b"1", "b": b"1"}, {"a": b"1"},
         old=Wrong("marks of removal are files to it", {"a": b"1", "b": b"1", ".wh.b": b""})),
    Case("oci-hard-link", "oci_link", {"a": b"1"}, {"a": b"1", "b": b"1"},
         old=Wrong("the target's path is not shortened")),
    Case("oci-missing-tag", "oci", MODEL, Failed("v9"), ("$image:v9", "$dest")),
    Case("oci-missing-image", "oci", MODEL, Failed("nothing"), ("$image-nothing:v1", "$dest")),
    Case("oci-no-image", "oci", MODEL, Failed("oci://"), ("oci://", "$dest")),
    Case("oci-on-this-machine", "oci", MODEL, MODEL, variables=SECURE,
         old=Wrong("it asks even a registry on this machine by https")),
    Case("oci-login", "oci_private", MODEL, MODEL,
         old=Wrong("its login fails in silence, and it repeats what is refused", endless=True)),
    Case("oci-no-login", "oci_private", MODEL, Failed(DENIED),
         variables={"KSERVE_OCI_DOCKER_CONFIG": "/nowhere"},
         old=Wrong("it repeats what is refused", endless=True)),
]  # fmt: skip

GIT = [
    Case("git-repository", "git", MODEL, MODEL),
    Case("git-login", "git_private", MODEL, MODEL,
         variables={"GIT_USERNAME": "$user", "GIT_PASSWORD": "$password"}),
    Case("git-user-in-the-url", "git_private", MODEL, MODEL, ("$named", "$dest"),
         {"GIT_PASSWORD": "$password"}),
    Case("git-wrong-password", "git_private", MODEL, Failed(DENIED),
         variables={"GIT_USERNAME": "$user", "GIT_PASSWORD": "another-secret"}),
    Case("git-no-login", "git_private", MODEL, Failed(DENIED)),
    Case("git-missing", "git", MODEL, Failed("nothing.git"), ("$beside/nothing.git", "$dest")),
    Case("git-unknown-authority", "git", MODEL, Failed("certificate|TLS|SSL"),
         variables={"XDG_CONFIG_HOME": None, "REQUESTS_CA_BUNDLE": None}),
]  # fmt: skip

MODELSCOPE = [
    Case("modelscope-model", "modelscope", MODEL, MODEL),
    Case("modelscope-revision", "modelscope", {**MODEL, "v1:old.bin": b"1"}, {"old.bin": b"1"},
         ("$root:v1", "$dest")),
    Case("modelscope-missing", "modelscope", MODEL, Failed("nothing"),
         ("modelscope://owner/nothing", "$dest")),
    Case("modelscope-missing-revision", "modelscope", MODEL, Failed("v9"), ("$root:v9", "$dest")),
    Case("modelscope-no-model", "modelscope", MODEL, Failed("modelscope://"),
         ("modelscope://owner/", "$dest")),
    Case("modelscope-allow", "modelscope", TYPES, {"b.bin": b"2"},
         variables={"STORAGE_ALLOW_PATTERNS": "*.bin"}),
    Case("modelscope-ignore", "modelscope", TYPES, {"a.safetensors": b"1", "b.bin": b"2"},
         variables={"STORAGE_IGNORE_PATTERNS": "notes/*"}),
    Case("modelscope-private", "modelscope_private", MODEL, MODEL,
         variables={"MODELSCOPE_API_TOKEN": "$token"}),
    Case("modelscope-private-without-a-token", "modelscope_private", MODEL,
         Failed(f"{DENIED}|modelscope-private")),
]  # fmt: skip

CASES = [*HUB, *IMAGES, *GIT, *MODELSCOPE]

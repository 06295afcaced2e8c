"""A trained model to the Hugging Face Hub, and from it, without a network."""

import json

import pytest
import torch

import crate_mae
from crate_mae.deployment.card import provenance

NANO = "crate_mae_nano_patch2_8"
BUNDLED = "crate_mae_micro_monotone_cifar10"


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it."""
    folder = tmp_path / "run"
    torch.manual_seed(1)
    crate_mae.save(crate_mae.create_model(NANO, depth=1, decoder_depth=1), folder)
    (folder / "config.yaml").write_text(
        "command: pretrain\ndata: /home/somebody/secret/photos/train\nmodel: crate_mae_nano_patch2_8\n"
        "steps: 40\nbatch_size: 8\nlr: 0.001\nseed: 3\nprecision: float32\n",
        encoding="utf-8",
    )
    (folder / "metrics.csv").write_text("step,loss,held_out_loss\n0,,2.5\n20,1.0,\n40,0.5,0.75\n", encoding="utf-8")
    (folder / "environment.json").write_text(
        json.dumps({"packages": {"torch": "2.9.9"}, "processor": "AVX2", "gpus": []}), encoding="utf-8"
    )
    probe = {"probe": "linear", "val": "photos/test", "val_images": 1000}
    probe["results"] = [{"layer": 0, "top1": {"value": 0.625, "low": 0.5, "high": 0.7}}]
    (folder / "linear.json").write_text(json.dumps(probe), encoding="utf-8")
    return folder


def test_what_a_run_tells(run):
    facts = provenance(run)
    assert facts["Data"] == "train"  # and not whose
    assert "steps 40, batch_size 8, lr 0.001" in facts["Recipe"] and "seed 3" in facts["Recipe"]
    assert "Loss on held-out images: 2.5 at step 0, 0.75 at step 40." in facts["Results"]
    assert "linear probe, layer 0: 62.5% of 1,000 images of test." in facts["Results"]
    assert facts["Environment"] == "torch 2.9.9, AVX2"
    assert provenance(BUNDLED)["Training"].startswith("A CRATE-MAE with monotone layers and 1.86 M parameters")
    for name in (NANO, f"{BUNDLED}:untrained"):
        assert provenance(name) == {"Training": "None: the weights are a random initialisation."}


def test_the_score_in_a_card_is_that_of_the_weights(run):
    """The best model of fine-tuning, of an unfinished run that of its newest checkpoint."""
    (run / "config.yaml").write_text("command: finetune\nmodel: /a/b/mine\ntrain: python:list\nval: hf:a/b\n")
    (run / "metrics.csv").write_text("step,val_accuracy\n0,0.1\n20,0.75\n40,0.5\n", encoding="utf-8")
    (run / "checkpoints" / "step-20").mkdir(parents=True)
    (run / "checkpoints" / "step-20" / "state.json").write_text("{}")
    (run / "checkpoints" / "best").write_text("step-20\n")
    facts = provenance(run)
    assert "Accuracy on validation images: 10.0% at step 0, 75.0% at step 20." in facts["Results"]
    assert facts["Data"] == "images that were given as a Python object, which has no name; measured on hf:a/b"
    assert facts["Recipe"].startswith("`crate-mae finetune` of `mine`")
    checkpoint = run / "checkpoints" / "step-40"
    checkpoint.mkdir()
    (run / "config.json").rename(checkpoint / "config.json")
    (run / "model.safetensors").rename(checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text("{}")
    assert "50.0% at step 40" in provenance(run)["Results"]
    assert provenance(checkpoint) == provenance(run) | {
        "Results": "- Accuracy on validation images: 10.0% at step 0, 50.0% at step 40."
    }


def test_a_card_is_no_reason_to_fail(run):
    (run / "config.yaml").write_text("data: [", encoding="utf-8")
    assert provenance(run) == {}
    (run / "config.yaml").write_text("data: x", encoding="utf-8")
    (run / "linear.json").write_text("{", encoding="utf-8")
    assert "held-out" in provenance(run)["Results"]
    for found in ('{"probe": "knn", "results": null}', '{"probe": "knn", "results": [{"top1": {"value": null}}]}'):
        (run / "linear.json").write_text(found, encoding="utf-8")
        assert "held-out" in provenance(run)["Results"]
    environment = (run / "environment.json").read_text(encoding="utf-8")
    (run / "environment.json").write_text('{"packages": null}', encoding="utf-8")
    assert "held-out" in provenance(run)["Results"]
    (run / "environment.json").write_text(environment, encoding="utf-8")
    (run / "config.yaml").write_text("command: finetune", encoding="utf-8")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best").write_text("no checkpoint")
    assert "held-out" in provenance(run)["Results"]
    spreadsheet = "\ufeffstep,val_accuracy\n0,0.1\n20,0.75\n40,0.\n60,nan\n,0.9\n80,o"
    (run / "metrics.csv").write_text(spreadsheet, encoding="utf-8")
    assert "10.0% at step 0, 0.0% at step 40." in provenance(run)["Results"]
    (run / "metrics.csv").write_bytes(b"step,val_accuracy\n0,\xff\n")
    assert "Results" not in provenance(run)


class Hub:
    """What `huggingface_hub.HfApi` does, as far as it is asked."""

    error = None
    uploaded: dict

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, private, exist_ok):
        if Hub.error is not None:
            raise Hub.error
        Hub.private = private
        return type("Repository", (), {"repo_id": repo_id})()

    def upload_folder(self, repo_id, folder_path, revision, commit_message):
        files = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        Hub.uploaded = {"repo_id": repo_id, "revision": revision, "message": commit_message, "files": files}
        return f"https://hub.example/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "error", None)
    return Hub


@pytest.mark.parametrize("kind", ["safetensors", "hf"])
def test_push_uploads_the_model_and_the_card_of_its_run(run, hub, crate_mae_command, tmp_path, kind):
    if kind == "hf":
        pytest.importorskip("transformers")
    options = ["--format", kind, "--license", "cc0-1.0"]
    code, out, err = crate_mae_command("push", run, "somebody/mine", *options)
    assert code == 0, err
    assert "https://hub.example/somebody/mine" in out
    card = hub.uploaded["files"]["README.md"].decode()
    assert card.startswith("---\n") and "license: cc0-1.0" in card
    assert "train" in card and "secret" not in card and "62.5%" in card
    for name, content in hub.uploaded["files"].items():
        (tmp_path / name).write_bytes(content)
    assert crate_mae.load(tmp_path).config == crate_mae.load(run).config


def test_a_model_of_transformers_pushes_its_card_too(run, hub, tmp_path):
    transformers = pytest.importorskip("transformers")
    crate_mae.export(run, out=tmp_path / "x", format="hf")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "x")
    options = {"private": True, "revision": "draft", "commit_message": "First"}
    for upload, name in ((_by_push, "somebody/encoder"), (_by_save, "somebody/other")):
        upload(theirs, name, tmp_path / "y", **options)
        assert hub.uploaded["repo_id"] == name
        assert "train" in hub.uploaded["files"]["README.md"].decode()
        assert (hub.private, hub.uploaded["revision"], hub.uploaded["message"]) == tuple(options.values())


def _by_push(model, name, _folder, **options):
    model.push_to_hub(name, **options)


def _by_save(model, name, folder, **options):
    model.save_pretrained(folder, push_to_hub=True, repo_id=name, **options)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("no route"), "cannot be reached"),
        (RuntimeError("a defect"), None),
    ],
)
def test_without_a_network_one_line_says_what_works(run, hub, monkeypatch, error, words):
    monkeypatch.setattr(hub, "error", error)
    if words is None:  # what is no mistake of the user's is not called one
        with pytest.raises(RuntimeError, match="a defect"):
            crate_mae.push(run, "somebody/mine", format="safetensors")
        return
    with pytest.raises(crate_mae.UserError, match=words) as told:
        crate_mae.push(run, "somebody/mine", format="safetensors")
    assert "crate-mae export" in str(told.value)


def test_names_that_are_none_are_refused_before_anything_is_loaded(crate_mae_command):
    code, _, err = crate_mae_command("push", "no-such-model", "mine")
    assert code == 2 and "must look like user/name" in err


def test_a_model_on_the_hub_that_is_not_there_and_no_network(monkeypatch, crate_mae_command, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    for error, words in ((LocalEntryNotFoundError("offline"), "cannot be reached"), (missing, "has no no/such")):

        def refuse(*_arguments, error=error, **_options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        code, _, err = crate_mae_command("export", "hf:no/such", "--out", tmp_path / "x")
        assert code == 2 and words in err and "Traceback" not in err
        assert "Offline, use a folder" in err
        assert not (tmp_path / "x").exists()

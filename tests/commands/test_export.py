"""Exported models compute what the model does, in the programs they are for."""

import ast
import json
import math
import os
import runpy
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import crate_mae
from crate_mae.deployment import formats, plain_model
from crate_mae.deployment.formats import folded
from crate_mae.errors import UserError, install_command
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.models.classifier import build_classifier
from crate_mae.models.config import ClassifierConfig
from crate_mae.models.layers import ISTA
from crate_mae.models.presets import preset

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1, "image_size": (6, 10)}
NANO = "crate_mae_nano_patch2_8"
ROOT = Path(crate_mae.__file__).parents[2]
# What the exporters of PyTorch and of onnxruntime say about themselves.
EXPORTERS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def saved(folder, name=NANO, **settings):
    torch.manual_seed(1)
    model = crate_mae.create_model(name, **{**SMALL, **settings}).eval()
    crate_mae.save(model, folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return saved(tmp_path / "model")


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(1)
    net = build_classifier(ClassifierConfig(encoder=preset(NANO).replace(**SMALL), classes=("ant", "bee", "cat")))
    torch.nn.init.normal_(net.head.weight)
    crate_mae.save(net, tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize(
    "settings",
    [{}, {"output_projection": "tied"}, {"mask_tokens": "decoder"}, {"layer": "compressing"}, {"layer": "monotone"}],
)
def test_a_folded_model_is_the_same_function(settings):
    torch.manual_seed(1)
    net = crate_mae.create_model(NANO, **SMALL, **settings).eval()
    images = torch.randn(3, 3, 6, 10)
    small = folded(net)
    assert not any(isinstance(part, ISTA) for part in small.modules())
    torch.testing.assert_close(small(images).prediction, net(images).prediction, rtol=1e-4, atol=1e-5)
    assert isinstance(net.encoder.blocks[0].ista, ISTA)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [*((kind, "monotone") for kind in ("safetensors", "timm", "pt2", "onnx")), ("onnx", "compressing")],
)
@EXPORTERS
def test_monotone_and_compressing_layers_are_exported_and_verified(tmp_path, crate_mae_command, kind, layer):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    model = saved(tmp_path / "model", layer=layer, depth=1)
    code, _, err = crate_mae_command("export", model, "--out", tmp_path / "x", "--format", kind, "--verify")
    assert code == 0, err


PLAIN = """
import sys

for library in ("crate_mae", "timm", "torchvision", "transformers"):
    sys.modules[library] = None  # as if it were not installed
from model import load
from safetensors.torch import load_file, save_file

save_file({"found": load()(load_file("images.safetensors")["images"])}, "found.safetensors")
"""


def run_plain(folder, images):
    """What model.py of a folder makes of images where PyTorch and safetensors alone are installed."""
    save_file({"images": images}, folder / "images.safetensors")
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'){PLAIN}"], cwd=folder, check=True)
    return load_file(folder / "found.safetensors")["found"]


def difference_with_sharp_attention(model, tmp_path):
    """The largest difference of a plain file where the attention of some tokens underflows to 0."""
    sharp = crate_mae.load(model)
    for block in sharp.encoder.blocks:
        block.attn.log_scale.data.fill_(math.log(1000.0))
    return crate_mae.export(
        sharp, out=tmp_path / "sharp", format="torch", verify=True, tolerance=0.01
    ).largest_difference


@pytest.mark.parametrize(
    "settings",
    [
        {"output_projection": "tied", "threshold": 0.2, "step_size": 0.05},
        {"overcomplete": 2, "ista_skip": True, "init": "official"},
        {"layer": "compressing"},
        {"layer": "monotone", "ista_steps": 3},
    ],
)
def test_an_encoder_as_one_plain_file_is_the_same(tmp_path, settings):
    model = saved(tmp_path / "model", **settings)
    exported = crate_mae.export(model, out=tmp_path / "x", format="torch", verify=True)
    assert exported.largest_difference < 1e-5
    if "layer" in settings:
        assert difference_with_sharp_attention(model, tmp_path) < 0.01
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        "model.py",
        "model.safetensors",
        "config.json",
        "README.md",
    }
    net = runpy.run_path(str(tmp_path / "x" / "model.py"))["load"](tmp_path / "x")
    own = (3, *SMALL["image_size"])
    for shape in ((1, 3, 4, 4), (1, 1, *own[1:]), own):
        with pytest.raises(ValueError, match="this model takes"):
            net(torch.zeros(shape))


def test_a_classifier_as_one_plain_file_runs_where_this_library_is_not(classifier, tmp_path):
    crate_mae.export(classifier, out=tmp_path / "x", format="torch", verify=True)
    card = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert code.split("\n")[0].startswith("from model import load") and "logits = model(images)" in code
    images, model = torch.randn(3, 3, 6, 10), crate_mae.load(classifier).eval()
    torch.testing.assert_close(run_plain(tmp_path / "x", images), model(images), rtol=1e-4, atol=1e-5)
    net = runpy.run_path(str(tmp_path / "x" / "model.py"))["load"](tmp_path / "x")
    assert net.classes == ("ant", "bee", "cat")


def test_the_plain_file_imports_nothing_else():
    tree = ast.parse(Path(plain_model.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {"json", "pathlib", "typing", "torch", "safetensors"}


def test_what_has_no_plain_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no decoders"):
        crate_mae.export(saved(tmp_path / "model"), out=tmp_path / "x", format="torch", part="full")
    vit = crate_mae.create_model("vit_mae_nano_patch2_8")
    with pytest.raises(UserError, match="which timm has: use --format timm"):
        crate_mae.export(vit, out=tmp_path / "x", format="torch")
    assert not (tmp_path / "x").exists()


def run_card(folder, monkeypatch, **names):
    """Do what the card says, in the folder."""
    monkeypatch.chdir(folder)
    exec((folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    return names


@pytest.mark.parametrize(
    ("kind", "part"), [("safetensors", "full"), ("safetensors", "encoder"), ("timm", None), ("pt2", None)]
)
@EXPORTERS
def test_what_is_exported_is_the_model(model, tmp_path, crate_mae_command, monkeypatch, kind, part):
    options = ["--part", part] if part else []
    code, out, err = crate_mae_command("export", model, "--out", tmp_path / "x", "--format", kind, *options, "--verify")
    assert code == 0, err
    assert "Largest difference from the model" in out
    if kind == "pt2" or part == "full":  # that of timm is run together with transformers, in their test
        names = run_card(tmp_path / "x", monkeypatch, images=torch.randn(3, 3, 8, 8))
        if kind == "pt2":
            assert names["tokens"].shape == (3, 17, 24)
        else:
            assert names["model"].config == crate_mae.load(model).config


@pytest.mark.parametrize("settings", [{}, {"mask_tokens": "decoder", "norm_pix_loss": True}, {"overcomplete": 2}])
@EXPORTERS
def test_a_whole_model_as_a_graph(tmp_path, monkeypatch, settings):
    model = saved(tmp_path / "model", **settings)
    exported = crate_mae.export(model, out=tmp_path / "x", format="pt2", part="full", verify=True)
    assert exported.largest_difference < 1e-5
    text = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert ("own mean and standard deviation" in text) == ("norm_pix_loss" in settings)
    assert ("`visible`: int64, batch x visible patches: indices of the visible" in text) == ("mask_tokens" in settings)
    assert " (full model)\n" in text and "\n## Inputs\n" in text and "\n## Outputs\n" in text
    mask, visible = torch.ones(1, 15, dtype=torch.bool), torch.arange(4)[None]
    names = run_card(tmp_path / "x", monkeypatch, images=torch.randn(1, 3, 6, 10), mask=mask, visible=visible)
    assert names["prediction"].shape == (1, 15, 12)


@pytest.mark.parametrize("size", [(2, 4), (2, 6), (4, 6)])
@EXPORTERS
def test_a_whole_model_of_few_patches_as_a_graph(tmp_path, size):
    model = saved(tmp_path / "model", image_size=size, mask_tokens="decoder")
    exported = crate_mae.export(model, out=tmp_path / "x", format="pt2", part="full", verify=True)
    assert exported.largest_difference < 1e-5


@EXPORTERS
def test_onnx_takes_any_batch_and_image_size(model, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    exported = crate_mae.export(model, out=tmp_path / "x", format="onnx", verify=True)
    assert exported.largest_difference < 1e-5
    card = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert " (encoder)\n" in card and "Other sizes are accepted if both sides are multiples of 2 pixels." in card
    encoder = crate_mae.load(model).encoder
    encoder.set_input_size((8, 14))
    images = torch.randn(5, 3, 8, 14)
    found = formats.onnx_runner(tmp_path / "x")({"images": images})
    torch.testing.assert_close(found["tokens"], encoder.forward_features(images), rtol=1e-4, atol=1e-5)
    assert found["embedding"].shape == (5, 48)
    names = run_card(tmp_path / "x", monkeypatch, images=images.numpy())
    assert names["tokens"].shape == (5, 29, 24)
    for rows, columns in ((9, 14), (8, 13)):  # patches are of 2 x 2
        with pytest.raises(Exception, match="reshape"):
            formats.onnx_runner(tmp_path / "x")({"images": torch.randn(5, 3, rows, columns)})


@pytest.mark.parametrize("kind", ["hf", "timm", "onnx"])
def test_a_layer_that_computes_otherwise_than_described_is_not_exported(model, tmp_path, kind):
    changed = crate_mae.load(model)
    changed.encoder.blocks[1].ista.step_size = 9.0
    with pytest.raises(UserError, match=r"encoder.blocks.1.ista.step_size of this model is 9.0"):
        formats.write(changed, tmp_path, kind, "encoder")


@pytest.mark.parametrize(
    ("part", "number", "value", "advice"),
    [
        ("encoder.blocks.1.ista", "steps", 5, r"load\(MODEL, ista_steps=...\)"),
        ("decoder.norm", "eps", 0.5, r"Change it back\.$"),
    ],
)
def test_the_advice_about_such_a_layer_can_be_followed(tmp_path, part, number, value, advice):
    changed = crate_mae.load(saved(tmp_path / "model", layer="monotone"))
    setattr(changed.get_submodule(part), number, value)
    with pytest.raises(UserError, match=advice):
        crate_mae.save(changed, tmp_path / "x")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "timm", "hf", "onnx", "pt2"])
def test_a_model_that_is_not_finite_is_not_exported(model, tmp_path, kind):
    broken = crate_mae.load(model)
    broken.encoder.cls_token.data[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite, in 1 tensor\(s\) such as encoder.cls_token"):
        crate_mae.export(broken, out=tmp_path / "x", format=kind)
    assert not (tmp_path / "x").exists()


@EXPORTERS
@pytest.mark.parametrize("layer", ["monotone", "published"])
def test_int8_is_smaller_and_near(layer, tmp_path):
    pytest.importorskip("onnxruntime")
    model = saved(tmp_path / "model", layer=layer, embed_dim=512, num_heads=8, depth=1, decoder_depth=1)
    exported = crate_mae.export(model, out=tmp_path / "x", format="onnx", int8=True, verify=True)
    # A fourth of three matrices of a published layer, of four of a monotone one; and the rest as it was.
    matrices = {"monotone": 4, "published": 3}[layer]
    assert matrices * 512**2 < exported.bytes < 1.2 * matrices * 512**2
    assert 1e-4 < exported.largest_difference < 1.0  # of tokens of up to 16, whose rounding depends on the processor
    assert "8-bit" in (tmp_path / "x" / "README.md").read_text(encoding="utf-8")


@EXPORTERS
def test_a_classifier_as_a_graph(classifier, tmp_path):
    exported = crate_mae.export(classifier, out=tmp_path / "x", format="pt2", verify=True)
    assert exported.part == "full"
    assert exported.largest_difference < 1e-5
    card = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert "ant, bee, cat" in card and "image-classification" in card


def test_a_classifier_without_its_head_is_said_to_be_none(classifier, tmp_path, capsys):
    assert crate_mae.export(classifier, out=tmp_path / "x", format="timm").part == "encoder"
    assert "It has no head: its outputs are features, not classes." in capsys.readouterr().out
    assert "image-feature-extraction" in (tmp_path / "x" / "README.md").read_text(encoding="utf-8")


def test_an_untrained_model_is_said_to_be_so(model, tmp_path, capsys):
    crate_mae.export(f"{model}:untrained", out=tmp_path / "x")
    assert f"{model}:untrained has a random initialisation" in capsys.readouterr().out


def contents(folder):
    """The bytes of all files, and of those inside archives."""
    for file in folder.rglob("*"):
        if file.is_file():
            yield file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                yield from map(archive.read, archive.namelist())


@pytest.mark.parametrize("kind", ["safetensors", "timm", "hf", "onnx", "pt2"])
@EXPORTERS
def test_nothing_that_is_exported_names_a_folder_of_this_machine(tmp_path, kind):
    needed = {"hf": "transformers", "onnx": "onnxscript"}
    if kind in needed:
        pytest.importorskip(needed[kind])
    run = saved(tmp_path / "Unmistakable" / "run", depth=1)
    data = f"data: {run.parent}/photos\nval: {run.parent}/photos-val\ninit_from: {run.parent}/start\n"
    (run / "config.yaml").write_text(f"command: pretrain\nmodel: {run.parent}/odd\n{data}")
    (run / "linear.json").write_text(json.dumps({"probe": "linear", "val": f"{run.parent}/val", "results": []}))
    for part in ("encoder", None if kind == "timm" else "full"):
        crate_mae.export(run, out=tmp_path / f"{kind}-{part}", format=kind, part=part)
        found = b"\0".join(contents(tmp_path / f"{kind}-{part}"))
        assert b"photos; measured on photos-val" in found and b"starting from `start`" in found
        for private in (b"Unmistakable", *(str(path).encode() for path in (ROOT, sys.prefix, Path.home()))):
            assert private not in found


@pytest.mark.parametrize("form", ["safetensors", "timm", "hf"])
def test_exported_files_have_the_usual_mode(model, tmp_path, form):
    before = os.umask(0o027)
    try:
        crate_mae.export(model, out=tmp_path / "x", format=form)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "x").iterdir()} == {0o640}


def test_timm_opens_the_folder_and_our_commands_too(tmp_path):
    model = saved(tmp_path / "model", name=NANO, threshold=0.2, output_projection="tied")
    crate_mae.export(model, out=tmp_path / "x", format="timm")
    encoder = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    images = torch.randn(2, 3, 6, 10)
    expected = crate_mae.load(model).encoder.forward_features(images)
    torch.testing.assert_close(encoder.forward_features(images), expected)
    other = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True, in_chans=1, num_classes=3)
    assert other(torch.randn(2, 1, 6, 10)).shape == (2, 3)
    backbone = open_backbone(str(tmp_path / "x"))
    assert backbone.image_size == (6, 10) and not backbone.is_random
    torch.testing.assert_close(backbone.encoder.forward_features(images), expected)
    with pytest.raises(crate_mae.UserError, match="an encoder alone, in timm's layout"):
        crate_mae.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--format", "timm", "--part", "full"], "timm takes encoders only"),
        (["--format", "pt2", "--int8"], "--int8 is for encoders in ONNX"),
        (["--format", "tflite"], "tflite"),
    ],
)
def test_mistakes_are_told_and_nothing_is_made(model, tmp_path, crate_mae_command, tokens, words):
    code, _, err = crate_mae_command("export", model, "--out", tmp_path / "x", *tokens)
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_there_is_left_alone(model, tmp_path, crate_mae_command):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    code, _, err = crate_mae_command("export", model, "--out", tmp_path / "x")
    assert code == 2 and "exists already" in err
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["mine.txt"]
    (tmp_path / "x" / "mine.txt").unlink()
    assert crate_mae_command("export", model, "--out", tmp_path / "x")[0] == 0  # an empty folder may be filled


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(formats, "write", lambda *_arguments, **_options: pytest.fail("has begun to write"))
    model = crate_mae.create_model(NANO)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # anybody may look, and only we may write
        users = os.getresuid()
        os.setresuid(65534, 65534, 0)
        try:
            with pytest.raises(UserError, match=f"Cannot write into {folder}. Give another folder with --out."):
                crate_mae.export(model, out=f"{folder}/exported")
        finally:
            os.setresuid(*users)
        assert not list(Path(folder).iterdir())


def test_an_empty_folder_that_is_the_current_one_or_behind_a_link_is_filled(
    model, tmp_path, crate_mae_command, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "link"):
        assert crate_mae_command("export", model, "--out", out)[0] == 0
        names = {path.name for path in (tmp_path / "here").iterdir()}
        assert names == {"model.safetensors", "config.json", "README.md"}
        for name in names:
            (tmp_path / "here" / name).unlink()
    assert {path.name for path in tmp_path.iterdir()} >= {"here", "link"}
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))
    (tmp_path / "nowhere").symlink_to("missing")
    code, _, err = crate_mae_command("export", model, "--out", tmp_path / "nowhere")
    assert code == 2 and "is a link to nothing" in err


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(crate_mae.UserError, match="onnx and onnxscript and onnxruntime: ") as refused:
        crate_mae.export(model, out=tmp_path / "x", format="onnx")
    assert str(refused.value).endswith(install_command("onnx"))


@pytest.mark.parametrize(
    ("url", "addresses", "command", "public"),
    [
        ("file:///home/me/my%20crate", [], "pip install '/home/me/my crate[onnx]'", "pip install ."),
        ("", [], "pip install 'crate-mae[onnx]'", "pip install crate-mae"),
        ("file:///x", ["Repository, https://a.b/c"], *(["pip install 'crate-mae{} @ git+https://a.b/c'"] * 2)),
    ],
)
def test_the_library_is_installed_from_where_it_is(monkeypatch, url, addresses, command, public):
    """Not from a package index where it is not, and no folder of ours in what others read."""
    text = json.dumps({"url": url}) if url else None
    headers = SimpleNamespace(get_all=lambda name: addresses if name == "Project-URL" else None)
    found = SimpleNamespace(metadata=headers, read_text=lambda _name: text)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _name: found)
    assert install_command("onnx") == command.format("[onnx]")
    assert install_command(public=True) == public.format("")


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@EXPORTERS
def test_what_only_a_running_program_can_do_is_refused(model, tmp_path, monkeypatch, kind):
    """A branch on the values of images: a graph has none."""

    def forward(self, images):
        return (images if images.mean() > 0 else -images), images

    monkeypatch.setattr("crate_mae.deployment.formats.EncoderGraph.forward", forward)
    with pytest.raises(crate_mae.UserError, match=rf"^\S+ cannot be exported as {kind}: \S") as told:
        crate_mae.export(model, out=tmp_path / "x", format=kind)
    assert str(told.value).count("\n") == 1 and "--format safetensors or hf" in str(told.value)
    assert not (tmp_path / "x").exists()


def test_an_export_that_differs_is_taken_away(model, tmp_path, monkeypatch, crate_mae_command):
    write = formats.write

    def write_tampered(net, folder, *rest, **options):
        size = write(net, folder, *rest, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors["decoder.pred.bias"] += 0.01
        save_file(tensors, folder / "model.safetensors")
        return size

    monkeypatch.setattr(formats, "write", write_tampered)
    code, _, err = crate_mae_command("export", model, "--out", tmp_path / "x", "--verify")
    assert code == 2 and "differs from the model by up to" in err
    assert not (tmp_path / "x").exists()


def test_an_export_that_gives_no_numbers_is_taken_away(model, tmp_path, monkeypatch):
    def broken(*_arguments):
        return lambda inputs: {name: torch.full_like(value, math.nan) for name, value in exact(inputs).items()}

    usual = formats.runner
    exact = usual(crate_mae.load(model), Path(model), "safetensors", "full")
    monkeypatch.setattr(formats, "runner", broken)
    with pytest.raises(crate_mae.UserError, match="by up to nan"):
        crate_mae.export(model, out=tmp_path / "x", verify=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "part", "sizes"),
    [
        ("pt2", "encoder", {(6, 10), (8, 14)}),
        ("hf", "encoder", {(6, 10), (8, 14)}),
        ("pt2", "full", {(6, 10)}),
        ("timm", "encoder", {(6, 10)}),
    ],
)
@EXPORTERS
def test_an_export_is_verified_on_another_size_if_it_takes_any(model, tmp_path, monkeypatch, kind, part, sizes):
    runner, seen = formats.runner, set()

    def recording(*arguments):
        run = runner(*arguments)
        return lambda inputs: seen.add(tuple(inputs["images"].shape[2:])) or run(inputs)

    monkeypatch.setattr(formats, "runner", recording)
    assert crate_mae.export(model, out=tmp_path / "x", format=kind, part=part, verify=True).largest_difference < 1e-5
    assert seen == sizes


@pytest.mark.parametrize("fixed", ["encoder", "classifier"])
@EXPORTERS
def test_an_image_size_that_was_fixed_is_found(model, classifier, tmp_path, monkeypatch, crate_mae_command, fixed):
    free = formats._free_dimensions
    monkeypatch.setattr(formats, "_free_dimensions", lambda *args: {"images": {0: free(*args)["images"][0]}})
    net = {"encoder": model, "classifier": classifier}[fixed]
    code, _, err = crate_mae_command("export", net, "--out", tmp_path / "x", "--format", "pt2", "--verify")
    assert code == 2 and "does not run on 4 images of 8 x 14 pixels" in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_the_description_is_what_transformers_wraps(model, tmp_path):
    crate_mae.export(model, out=tmp_path / "x", format="timm")
    values = json.loads((tmp_path / "x" / "config.json").read_text(encoding="utf-8"))
    assert values["architecture"] == NANO and "num_classes" not in values["model_args"]

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator

from crate_mae.data import open_source
from crate_mae.data.resize import lossless_size
from crate_mae.errors import UserError
from crate_mae.evaluation.probes import knn_probe
from crate_mae.models import create_model
from crate_mae.models.completion import complete
from crate_mae.models.tracing import trace
from crate_mae.training import preflight
from crate_mae.training.images import open_images
from crate_mae.training.preflight import ProbeResult, probe
from crate_mae.training.pretraining import Monitor, Pretraining

IMAGES = torch.randn(37, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def state_of(model):
    return copy.deepcopy(model.state_dict())


def test_signals_are_those_of_the_definitions(tiny_model):
    monitor = Monitor(IMAGES, tiny_model.num_patches, 0.75)
    loss, features, layers = monitor.measure(tiny_model.train())
    with torch.no_grad():
        expected = tiny_model.eval()(IMAGES, mask=monitor.masks).loss
        with trace(tiny_model, ["encoder.blocks.*.ista", "encoder.blocks.*.attn.subspaces"]) as record:
            means = tiny_model.encoder.forward_features(IMAGES)[:, 1:].mean(dim=1)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(features, means)
    found = {(row["part"], row["layer"], row["measure"]): row["value"] for row in layers}
    wanted = {}
    for layer in range(2):
        codes = record[f"encoder.blocks.{layer}.ista"][0]
        wanted["encoder", layer, "zero_fraction"] = float((codes == 0).double().mean())
        w = record[f"encoder.blocks.{layer}.attn.subspaces"][0].double().unflatten(-1, (2, 12)).transpose(1, 2)
        w = w / w.norm(dim=-1, keepdim=True)
        gram = torch.eye(17) + 12 / (17 * 0.01) * w @ w.mT  # 17 tokens, subspaces of 12 dimensions, e = 0.01
        wanted["encoder", layer, "subspace_rate"] = float(0.5 * torch.logdet(gram).sum(1).mean())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_measuring_changes_nothing(tiny_model):
    before, random_state = state_of(tiny_model), torch.get_rng_state()
    monitor = Monitor(IMAGES, tiny_model.num_patches, 0.75)
    (*first, layers), (*second, same_layers) = monitor.measure(tiny_model.train()), monitor.measure(tiny_model)
    assert first[0] == second[0] and layers == same_layers
    assert torch.equal(first[1], second[1])
    assert tiny_model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())


@pytest.fixture
def labelled(config, tiny_model, tmp_path):
    """`labelled(data, **options)`: the task of pretraining on digits."""

    def task(data="digits", val=None, **options):
        options = {"out": tmp_path, "image_size": (8, 8), "batch_size": 64, "monitor_steps": 100, **options}
        return Pretraining(dataclasses.replace(config, **options), open_images(data, val), tiny_model.config)

    return task


def test_labels_are_measured_by_the_vote_of_eval_knn(labelled, tmp_path):
    (tmp_path / "pictures").mkdir()
    task = labelled()
    assert str(task.probe) == "k-NN accuracy of 89 held-out among 200 training images of 10 classes"
    values = task.measure(task.model, 0)
    chosen, held_out = task.probe._train, task.images.held_out
    images = torch.stack([task.probe._transform(chosen.read(i)) for i in range(200)])
    encoder = task.model.eval().encoder
    with torch.no_grad():
        train, val = (encoder.forward_features(x)[:, 1:].mean(dim=1) for x in (images, task.monitor.images))
    labels = open_source("digits").labels
    number = [int(held_out.location(i).split()[-1]) for i in range(89)]
    expected = knn_probe(train.numpy(), task.probe._labels.numpy(), val.numpy(), labels[number], k=10).top1.value
    assert values["knn_accuracy"] == pytest.approx(expected, abs=0.02)
    assert 0.1 < values["knn_accuracy"] < 1
    units = val / val.norm(dim=1, keepdim=True)
    gram = units @ units.T
    assert values["feature_cosine"] == pytest.approx(float((gram.sum() - 89) / (89 * 88)), abs=1e-4)
    singular = torch.linalg.svdvals(val - val.mean(dim=0))
    share = singular / singular.sum()
    assert values["feature_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-3)


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [(0.413, 0.355, "35.5% now, NOT above: for these labels, training has not helped."), (0.4, 0.5, "50.0% now.")],
)
def test_the_result_says_if_training_has_not_helped(labelled, first, last, said):
    rows = [{"held_out_loss": 1.0, "knn_accuracy": score} for score in (first, last)]
    assert labelled().describe_result(rows).endswith(said)


def test_an_accuracy_that_could_not_be_measured_is_not_reported(labelled):
    rows = [{"held_out_loss": 1.0, "knn_accuracy": math.nan} for _ in range(2)]
    assert "k-NN" not in labelled().describe_result(rows)


def test_without_a_held_out_image_of_the_classes_there_is_no_probe(labelled):
    generator = torch.Generator().manual_seed(0)
    images = [(torch.rand(1, 8, 8, generator=generator), i % 2) for i in range(400)]
    assert labelled(images, [(image, label) for image, label in images[:50]]).probe is not None
    assert labelled(images, [(image, 2) for image, _ in images[:50]]).probe is None


def test_the_loss_has_no_labels_and_the_probe_needs_enough(labelled, tmp_path):
    task = labelled()
    losses = [
        task.step_loss(0)(task.model.eval(), IMAGES[:32], labels, slice(0, 32)).detach()
        for labels in (torch.zeros(32, dtype=torch.int64), torch.arange(32))
    ]
    assert losses[0] == losses[1]
    assert labelled(monitor_steps=24).probe is None, "48 images are too few"
    unlabelled = list(torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert labelled(unlabelled).probe is None
    assert labelled("digits:train", "digits:test").probe is not None
    few = labelled("digits:train", [(torch.rand(1, 8, 8), 3), (torch.rand(1, 8, 8), 77)])
    assert "of 1 held-out" in str(few.probe), "of the other class there is none to find"


def test_a_model_without_sparse_codes_has_no_layer_signals():
    model = create_model("vit_mae_nano_patch2_8", in_chans=1, embed_dim=24, num_heads=2, depth=1, decoder_depth=1)
    assert Monitor(IMAGES, model.num_patches, 0.75).measure(model)[2] == []


def test_a_picture_is_written(tiny_model, tmp_path):
    Monitor(IMAGES, tiny_model.num_patches, 0.75).picture(tiny_model, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_picture_shows_images_from_all_over_the_data(tiny_model, tmp_path, monkeypatch):
    shown = []

    def complete_and_note(model, images, masks):
        shown.append((images, masks))
        return complete(model, images, masks)

    monkeypatch.setattr("crate_mae.training.pretraining.complete", complete_and_note)
    monitor = Monitor(IMAGES, tiny_model.num_patches, 0.75)
    monitor.picture(tiny_model, tmp_path / "a.png")
    ((images, masks),) = shown
    expected = [0, 4, 9, 13, 18, 23, 27, 32]  # of 37
    assert torch.equal(images, IMAGES[expected]) and torch.equal(masks, monitor.masks[expected])


@pytest.fixture
def task(config, tiny_model):
    """`task(precision)`: pretraining of a small model on the digits."""

    def build(precision):
        square = dataclasses.replace(config, image_size=(8, 8), precision=precision)
        return Pretraining(square, open_images("digits"), tiny_model.config)

    return build


def test_the_probe_touches_neither_the_model_nor_random_numbers(task):
    chosen = task("auto")
    before, random_state = state_of(chosen.model), torch.get_rng_state()
    found = probe(chosen, 8, Accelerator(cpu=True))
    assert found.precision in ("float32", "bfloat16") and "bfloat16" in found.reason
    assert found.seconds > 0 and found.memory > 2**20
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in chosen.model.state_dict().items())
    assert all(parameter.grad is None for parameter in chosen.model.parameters())


@pytest.mark.parametrize(("fast", "chosen"), [(0.9, "bfloat16"), (0.97, "float32"), (2.0, "float32")])
def test_bfloat16_is_taken_only_if_it_is_worth_it(task, monkeypatch, fast, chosen):
    seconds = {"float32": 1.0, "bfloat16": fast}
    monkeypatch.setattr(preflight, "multiplies_in_bfloat16", lambda _device: True)
    monkeypatch.setattr(preflight, "_seconds_per_step", lambda _t, _b, precision, _d: (seconds[precision], True))
    found = probe(task("auto"), 8, Accelerator(cpu=True))
    assert found.precision == chosen
    assert found.seconds == seconds[chosen]


def test_a_processor_that_multiplies_slowly_in_bfloat16_times_no_step_in_it(task, monkeypatch):
    monkeypatch.setattr(preflight, "multiplies_in_bfloat16", lambda _device: False)
    found = probe(task("auto"), 2, Accelerator(cpu=True))
    assert found.precision == "float32" and "more slowly" in found.reason


@pytest.mark.parametrize(("able", "reason"), [(True, ""), (False, "as asked, though this CPU multiplies more slowly")])
def test_a_given_precision_is_taken_and_reported_to_be_slow_where_it_is(task, monkeypatch, able, reason):
    monkeypatch.setattr(preflight, "multiplies_in_bfloat16", lambda _device: able)
    found = probe(task("bfloat16"), 2, Accelerator(cpu=True))
    assert found.precision == "bfloat16"
    assert found.reason.startswith(reason) and bool(found.reason) == bool(reason)


def test_a_gpu_without_bfloat16_refuses_it_and_takes_float32_by_itself(task, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    gpu = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="Tesla T4 does not compute in bfloat16: give --precision float32"):
        probe(task("bfloat16"), 2, gpu)
    monkeypatch.setattr(
        preflight, "_measured", lambda _t, _b, _s, precision, reason: ProbeResult(precision, reason, 1.0, 0.0, None)
    )
    assert probe(task("auto"), 2, gpu).precision == "float32"


def test_where_reading_takes_long_a_copy_is_tried(task, monkeypatch):
    chosen = task("float32")
    random_state = torch.get_rng_state()
    for seconds, is_tried in ((1e-9, True), (1e9, False)):
        monkeypatch.setattr(preflight, "_seconds_per_step", lambda *_, seconds=seconds: (seconds, True))
        found = probe(chosen, 2, Accelerator(cpu=True))
        assert (found.reduced is not None) == is_tried
        if found.reduced is not None:
            assert found.reduced[0] == lossless_size((8, 8), chosen.config.min_crop)
            assert 0 < found.reduced[1] < 1
    assert torch.equal(random_state, torch.get_rng_state())

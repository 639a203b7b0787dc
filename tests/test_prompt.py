"""The prompt network: the specification's identities, buffers and cache; DSP's prototypes from a prompt."""

import copy
import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_dsp import prompt as prompt_module
from nnunet_dsp.head import replace_last_layer
from nnunet_dsp.prompt import FLOOR, PromptNetwork, VotesAsLogits, initialise_prototypes, region_logits
from nnunet_dsp.prompt_settings import PROMPT_PLANS_KEY, PromptSettings


def unet(dim=2, channels=1, classes=3, deep_supervision=False):
    convolution, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dim]
    return PlainConvUNet(
        channels, 3, [4, 6, 8], convolution, [[3] * dim] * 3, [[1] * dim, [2] * dim, [2] * dim], [1] * 3, classes,
        [1] * 2, True, norm, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
        deep_supervision=deep_supervision,
    )  # fmt: skip


def network(dim=2, classes=3, seed=0, prompt=True, **settings):
    torch.manual_seed(seed)
    made = PromptNetwork(unet(dim, classes=classes), classes, PromptSettings(**settings))
    if prompt:
        made.set_prompt(*example_prompt(dim, classes))
    return made


def example_prompt(dim=2, classes=3, seed=3, size=16):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, 1, *[size] * dim, generator=generator)
    label = torch.randint(0, classes, (1, *[size] * dim), generator=generator)
    label[:, :4] = -1
    label[..., -5:] = -1
    return image, label


def naive_vote(made, x, image, label, classes):
    """softmax(Q K^T / t) V, formed as the specification has it."""
    settings = made.settings
    f, fs = (made.embedding(made.decoder(made.encoder(i))).detach().double() for i in (x, image))
    if settings.similarity == "cosine":
        f, fs = f / f.norm(dim=1, keepdim=True), fs / fs.norm(dim=1, keepdim=True)
    keys, labels = [], []
    for p in range(label.shape[0]):
        for position in range(label[p].numel()):
            if label[p].flatten()[position] >= 0:
                keys.append(fs[p].flatten(1)[:, position])
                labels.append(int(label[p].flatten()[position]))
    keys = torch.stack(keys)
    out = torch.zeros(x.shape[0], classes, *x.shape[2:], dtype=torch.float64)
    for b in range(x.shape[0]):
        attention = torch.softmax(f[b].flatten(1).T @ keys.T / settings.temperature, dim=1)
        for c in range(classes):
            mine = [j for j, label_ in enumerate(labels) if label_ == c]
            out[b, c] = attention[:, mine].sum(1).reshape(x.shape[2:])
    return out


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_votes_are_the_softmax_attention_over_the_labelled_voxels(dim, similarity):
    made = network(dim, similarity=similarity, temperature=0.5, max_keys=10**6, max_keys_prediction=10**6, key_groups=1)
    x = torch.randn(2, 1, *[16] * dim)
    image, label = (torch.cat(parts) for parts in zip(example_prompt(dim), example_prompt(dim, seed=4), strict=True))
    made.set_prompt(image, label)  # two windows vote together
    expected = naive_vote(made, x, image, label, 3)
    for mode in (made.train(), made.eval()):
        got = mode(x)
        assert got.shape == (2, 3, *[16] * dim)
        assert torch.allclose(got.exp().double(), expected, atol=3e-5)
        assert torch.allclose(got.softmax(1), got.exp(), atol=1e-6), "nnU-Net's softmax changes the votes"
        assert torch.allclose(got.exp().sum(1), torch.ones(2, *[16] * dim), atol=1e-5)


def test_gradients_flow_through_both_passes():
    made = network(key_groups=1).train()
    for item in range(2):  # each image alone: the prompt's pass must still reach the weights
        made.zero_grad()
        x = torch.randn(1, 1, 16, 16)
        embed = made.embed
        calls = []

        def embed_one(image, item=item, calls=calls, embed=embed):
            calls.append(image)
            result = embed(image)
            return result if len(calls) - 1 == item else result.detach()

        made.embed = embed_one
        torch.nn.functional.nll_loss(made(x), torch.randint(0, 3, (1, 16, 16))).backward()
        made.embed = embed
        assert len(calls) == 2
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [made.embedding.weight])


def test_compiling_changes_nothing():
    made = network(key_groups=1, max_keys=10**6, max_keys_prediction=10**6)
    compiled = torch.compile(made, backend="eager")  # what breaks graphs breaks them here, too; needs no compiler
    x = torch.randn(1, 1, 16, 16)
    compiled.train()(x).sum().backward()
    gradient = made.embedding.weight.grad.clone()
    made.zero_grad()
    made.train()(x).sum().backward()
    assert torch.allclose(gradient, made.embedding.weight.grad, atol=1e-5)
    with torch.inference_mode():
        before = compiled.eval()(x)
        assert torch.allclose(before, made.eval()(x), atol=1e-6)
        made.load_state_dict(network(seed=9).state_dict())
        assert torch.allclose(compiled(x), made(x), atol=1e-6) and not torch.allclose(compiled(x), before)


def test_every_parameter_gets_a_gradient_as_ddp_demands():
    made = network().train()
    made(torch.randn(1, 1, 16, 16)).sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None] == []


def test_nnunets_loss_sees_the_votes_and_ignored_voxels_have_no_gradient():
    made = network(key_groups=1).train()
    x = torch.randn(2, 1, 16, 16)
    target = torch.randint(0, 3, (2, 1, 16, 16))
    target[:, :, :9] = 3
    loss = DC_and_CE_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, weight_ce=1, weight_dice=0,
        ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss,
    )  # fmt: skip
    out = made(x)
    out.retain_grad()
    value = loss(out, target)
    assert value.requires_grad
    expected = [
        -float(out[b, target[b, 0, y, z], y, z].detach())
        for b in range(2) for y in range(9, 16) for z in range(16)
    ]  # fmt: skip
    assert float(value.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    value.backward()
    assert (out.grad[:, :, :9] == 0).all() and (out.grad[:, :, 9:] != 0).any()


def test_classes_the_prompt_does_not_show_get_the_floor():
    made = network(prompt=False)
    image, label = example_prompt()
    label[label == 1] = 2
    made.set_prompt(image, label)
    for mode in (made.train(), made.eval()):
        out = mode(torch.randn(1, 1, 16, 16))
        assert torch.allclose(out[:, 1], torch.full((1, 16, 16), math.log(FLOOR)))
        assert torch.allclose(out[:, [0, 2]].exp().sum(1), torch.ones(1, 16, 16), atol=1e-5)


def test_regions_get_the_logit_of_their_labels_share():
    torch.manual_seed(0)
    made = PromptNetwork(unet(), 2, PromptSettings())
    image, label = example_prompt()
    membership = torch.tensor([[False, True, True], [False, False, True]])
    made.set_prompt(image, label, membership)
    plain = network()
    plain.load_state_dict({**made.state_dict(), "prompt.seg_layers.membership": torch.zeros(0, dtype=torch.bool)})
    x = torch.randn(1, 1, 16, 16)
    got, votes = made.eval()(x), plain.eval()(x).exp()
    assert torch.allclose(got.sigmoid()[:, 0], votes[:, 1] + votes[:, 2], atol=1e-5)
    assert torch.allclose(got.sigmoid()[:, 1], votes[:, 2], atol=1e-5)
    everything = region_logits(torch.randn(1, 2, 3), torch.tensor([[True, True], [False, False]]))
    assert torch.allclose(everything[:, 0], torch.full((1, 3), -math.log(FLOOR)), atol=1e-4)
    assert torch.allclose(everything[:, 1], torch.full((1, 3), math.log(FLOOR)), atol=1e-4)


# the released variant ----------------------------------------------------------------------------------------------


def test_the_released_variant_returns_votes_in_training_and_their_logarithms_in_prediction():
    made = network(variant="released", embedding_channels=2, similarity="dot", temperature=1.0, key_groups=1,
                   max_keys=10**6, max_keys_prediction=10**6)  # fmt: skip
    assert made.embedding.out_channels == 2
    x = torch.randn(1, 1, 16, 16)
    votes = made.train()(x)
    assert (votes >= 0).all() and torch.allclose(votes.sum(1), torch.ones(1, 16, 16), atol=1e-5)
    assert torch.allclose(made.eval()(x).exp(), votes, atol=1e-5)


def test_the_released_loss_takes_votes_for_logits_and_has_its_floor():
    loss = VotesAsLogits(ignore_label=2)
    target = torch.tensor([[[[0, 1, 2]]]])
    perfect = torch.tensor([[[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]]]], requires_grad=True)
    assert float(loss(perfect.detach(), target)) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    assert float(loss(perfect.detach(), target)) == pytest.approx(0.3133, abs=1e-4)
    assert float(loss(1 - perfect.detach(), target)) == pytest.approx(1.3133, abs=1e-4)
    loss(perfect, target).backward()
    assert (perfect.grad[..., 2] == 0).all() and (perfect.grad[..., :2] != 0).all(), "none is left at the optimum"
    assert float(loss(perfect.detach(), torch.full_like(target, 2))) == 0


# buffers, checkpoints, cache ---------------------------------------------------------------------------------------


def test_a_state_dict_carries_the_prompt_whatever_its_size():
    made = network()
    made.set_prompt(torch.randn(2, 1, 24, 24), torch.randint(0, 3, (2, 24, 24)))
    fresh = network(prompt=False)
    assert not fresh.has_prompt
    with pytest.raises(RuntimeError, match="no prompt yet"):
        fresh(torch.randn(1, 1, 16, 16))
    fresh.load_state_dict(made.state_dict())
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(fresh.eval()(x), made.eval()(x))


def test_pretrained_weights_keep_this_trainings_own_prompt(tmp_path):
    old, new = network(seed=1), network(seed=2, prompt=False)
    old.set_prompt(torch.randn(1, 1, 32, 32), torch.randint(0, 3, (1, 32, 32)))
    torch.save({"network_weights": old.state_dict()}, tmp_path / "old.pth")
    load_pretrained_weights(new, str(tmp_path / "old.pth"))
    assert not new.has_prompt, "another dataset's prompt came with the weights"
    assert torch.equal(new.embedding.weight, old.embedding.weight), "the embedding is worth keeping"
    assert torch.equal(new.encoder.stages[0][0].convs[0].conv.weight, old.encoder.stages[0][0].convs[0].conv.weight)
    image, label = example_prompt()
    new.set_prompt(image, label)
    load_pretrained_weights(new, str(tmp_path / "old.pth"))
    assert torch.equal(new.prompt["seg_layers"].image, image)


def test_without_an_embedding_layer_nnunets_own_checkpoints_fit(tmp_path):
    torch.manual_seed(5)
    vanilla = unet(classes=7, deep_supervision=True)
    torch.save({"network_weights": vanilla.state_dict()}, tmp_path / "vanilla.pth")
    made = network(embedding_channels=0)
    load_pretrained_weights(made, str(tmp_path / "vanilla.pth"))
    assert torch.equal(made.decoder.stages[1].convs[0].conv.weight, vanilla.decoder.stages[1].convs[0].conv.weight)
    assert made(torch.randn(1, 1, 16, 16)).shape == (1, 3, 16, 16)


def count_embeddings(made, monkeypatch):
    sizes = []
    embed = PromptNetwork.embed

    def counted(self, image):
        sizes.append(image.shape[-1])
        return embed(self, image)

    monkeypatch.setattr(PromptNetwork, "embed", counted)
    return sizes


def test_keys_are_embedded_once_in_prediction_and_anew_when_anything_changes(monkeypatch):
    made = network().eval()
    made.set_prompt(torch.randn(1, 1, 24, 24), torch.randint(0, 3, (1, 24, 24)))  # told from targets by its size
    sizes = count_embeddings(made, monkeypatch)
    x = torch.randn(1, 1, 16, 16)

    def prompt_passes():
        sizes.clear()
        with torch.inference_mode():
            made(x)
            made(x)
        return sizes.count(24)

    assert prompt_passes() == 1
    assert prompt_passes() == 0
    for change in (
        lambda: made.load_state_dict(made.state_dict()),
        lambda: made.train().eval(),
        lambda: made.set_prompt(torch.randn(1, 1, 24, 24), torch.randint(0, 3, (1, 24, 24))),
        lambda: made.double().float(),
    ):
        change()
        assert prompt_passes() == 1, "stale keys"
    sizes.clear()
    made.train()(x)
    made(x)
    assert sizes.count(24) == 2, "in training the prompt is embedded in each step"


def test_keys_cached_in_inference_mode_serve_elsewhere(monkeypatch):
    made = network().eval()
    with torch.inference_mode():
        made(torch.randn(1, 1, 16, 16))
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        made(x)


def test_loading_other_weights_changes_the_prediction():
    first, second = network(seed=1).eval(), network(seed=2).eval()
    x = torch.randn(1, 1, 16, 16)
    with torch.inference_mode():
        before = first(x)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x)) and not torch.equal(first(x), before)


def test_predictions_repeat_and_training_draws_other_keys_each_step():
    made = network(max_keys=30, max_keys_prediction=30)
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(made.eval()(x), made.eval()(x))
    assert not torch.equal(made.train()(x), made.train()(x))


def test_blocks_on_a_cpu_share_the_keys_among_them(monkeypatch):
    made = network(max_keys=64).train()
    seen = []
    original = prompt_module.class_log_sums

    def noted(queries, keys, groups, **more):
        seen.append(groups)
        return original(queries, keys, groups, **more)

    monkeypatch.setattr(prompt_module, "class_log_sums", noted)
    made(torch.randn(1, 1, 16, 16))
    assert len(seen[0]) == prompt_module.GROUPS_ON_CPU
    made.eval()(torch.randn(1, 1, 16, 16))
    assert len(seen[1]) == 1


def test_half_precision_features_are_compared_in_float32():
    made = network().eval()
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
    made.forget_keys()
    assert out.dtype == torch.float32
    with torch.no_grad():
        assert (out.exp() - made(x).exp()).abs().max() < 0.1


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ((1, 1, 16, 16), (1, 16, 8), r"shapes \(P, C, \*S\) and \(P, \*S\)"),
        ((1, 1, 16, 16), None, "at least one labelled voxel"),
        ((1, 1, 16, 16), 3, "from -1 to 2, but got up to 3"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(image, label, message):
    made = network(prompt=False)
    if isinstance(label, tuple):
        labels = torch.zeros(label, dtype=torch.int64)
    else:
        labels = torch.full((1, 16, 16), -1 if label is None else label)
    with pytest.raises(ValueError, match=message):
        made.set_prompt(torch.zeros(image), labels)


def test_networks_without_nnunets_decoder_are_refused():
    with pytest.raises(NotImplementedError, match="the network Sequential has no such layer.*PlainConvUNet"):
        PromptNetwork(nn.Sequential(nn.Conv2d(1, 2, 1)), 2, PromptSettings())


# DSP's prototypes --------------------------------------------------------------------------------------------------


def test_dsp_prototypes_from_a_prompt_classify_it_better_than_random_ones():
    torch.manual_seed(0)
    dsp = replace_last_layer(unet(deep_supervision=True), num_prototypes=2)
    image = torch.zeros(1, 1, 32, 32)
    label = torch.full((1, 32, 32), -1)
    image[..., :16] = 3.0
    label[:, 4:28, 2:14], label[:, 4:28, 18:30] = 0, 2
    image += 0.05 * torch.randn_like(image)
    head = dsp.decoder.seg_layers[-1]
    before, statistics = head.prototypes.detach().clone(), copy.deepcopy(head.transform[0].state_dict())
    dsp.train()
    assert initialise_prototypes(dsp, image, label) == [0, 2]
    assert dsp.training
    assert torch.equal(head.prototypes[1], before[1]), "a class the prompt does not show was changed"
    assert not torch.equal(head.prototypes[0], before[0])
    assert all(torch.equal(value, statistics[name]) for name, value in head.transform[0].state_dict().items())
    assert torch.allclose(head.prototypes[[0, 2]].norm(dim=-1), torch.ones(2, 2), atol=1e-5)
    logits = dsp(image)[0]
    known = label >= 0
    right = (logits[:, [0, 2]].argmax(1) * 2 == label)[known].float().mean()
    assert right > 0.9


def test_initialising_prototypes_needs_a_prototype_head():
    with pytest.raises(NotImplementedError, match="PlainConvUNet has none"):
        initialise_prototypes(unet(), *example_prompt())


# settings ----------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_plans_over_the_trainers_own():
    given = PromptSettings.from_plans({PROMPT_PLANS_KEY: {"window": 48}}, PromptSettings(temperature=0.2))
    assert (given.window, given.temperature, given.max_keys) == (48, 0.2, 1024)
    assert PromptSettings.from_plans({PROMPT_PLANS_KEY: given.to_plans()}) == given
    assert PromptSettings.from_plans({PROMPT_PLANS_KEY: {"of_the_future": 1}}, strict=False) == PromptSettings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "Unknown setting `temprature`.*Did you mean `temperature`"),
        ({"temperature": 0}, "`temperature` to be above 0"),
        ({"temperature": float("inf")}, "`temperature` to be a finite number"),
        ({"temperature": True}, "`temperature` to be a finite number, but got True"),
        ({"similarity": "cos"}, "one of cosine, dot, but got 'cos'"),
        ({"window": 1.5}, "`window` to be a whole number of at least 0, but got 1.5"),
        ({"max_keys": 0}, "`max_keys` to be a whole number of at least 1"),
        ({"one_shot_case": 3}, "the name of a case, got 3"),
        ([], "to be an object, but got list"),
    ],
)
def test_impossible_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PromptSettings.from_plans({PROMPT_PLANS_KEY: given})

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from trl_multiturn import _upstream
from trl_multiturn.losses import full_vocab_kl
from trl_multiturn.models.value_model import ValueModel, decoder
from trl_multiturn.packing.decoder import capture_hidden_states
from trl_multiturn.trainer.values.joint_forward import attach_value_model, lm_head

from ..support import byte_tokenizer, tiny_model


IDS = torch.tensor([[70, 71, 72, 73], [80, 81, 82, 83]])


def policy(lora: bool = False):
    model = tiny_model(byte_tokenizer())
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def hidden_states(model) -> torch.Tensor:
    return model(IDS, output_hidden_states=True).hidden_states[-1]


class TestFromPolicy:
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("kind", ["adapter", "full", "head"])
    def test_values_start_at_zero_and_the_backbone_at_the_policy(self, kind, lora):
        model = policy(lora)
        value_model = ValueModel.from_policy(model, kind, lora_rank=2)
        if kind == "head":
            assert value_model.backbone is None
            assert value_model(hidden_states=hidden_states(model)).eq(0).all()
            return
        assert value_model(IDS, torch.ones_like(IDS)).eq(0).all()
        expected = hidden_states(model)
        if kind == "adapter" and lora:  # an adapter stands on the base, below the policy's own adapter
            with model.disable_adapter():
                expected = hidden_states(model)
        torch.testing.assert_close(value_model.backbone(IDS).last_hidden_state, expected)

    @pytest.mark.parametrize("lora", [False, True])
    def test_an_adapter_shares_the_weights_of_the_frozen_base(self, lora):
        model = policy(lora)
        base = None if lora else policy()
        value_model = ValueModel.from_policy(model, "adapter", base, lora_rank=2)
        owner = {p.data_ptr() for p in (model if lora else base).parameters()}
        new = [name for name, p in value_model.named_parameters() if p.data_ptr() not in owner]
        assert new and all("lora_" in name or name == "head.weight" for name in new)
        assert {n for n, p in value_model.named_parameters() if p.requires_grad} == set(new)
        if lora:  # building it left the policy's own adapter alone
            assert any(p.requires_grad and "default" in n for n, p in model.named_parameters())

    def test_a_full_model_shares_nothing(self):
        model = policy()
        value_model = ValueModel.from_policy(model, "full")
        theirs = {p.data_ptr() for p in model.parameters()}
        assert all(p.requires_grad and p.data_ptr() not in theirs for p in value_model.parameters())

    def test_training_an_adapter_leaves_the_policy_unmoved(self):
        model = policy(lora=True)
        value_model = ValueModel.from_policy(model, "adapter", lora_rank=2)
        before = model(IDS).logits
        optimizer = torch.optim.Adam([p for p in value_model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            (value_model(IDS) - 1).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(value_model(IDS), torch.ones(IDS.shape), rtol=0, atol=0.2)
        assert torch.equal(model(IDS).logits, before)

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(ValueError, match="'adapter', 'full' or 'head'"):
            ValueModel.from_policy(policy(), "separate")


class TestScore:
    def test_sequences_of_any_length_are_scored_at_their_last_token(self):
        value_model = ValueModel.from_policy(policy(), "full")
        torch.nn.init.normal_(value_model.head.weight)
        sequences = [[70, 71, 72], [73], [74, 75, 76, 77, 78], [70, 71]]
        expected = [value_model(torch.tensor([ids]))[0, -1].item() for ids in sequences]
        assert len(set(expected)) == 4
        for batch_size in (1, 3, 8):
            assert value_model.score(sequences, batch_size) == pytest.approx(expected, rel=1e-4)

    def test_what_has_no_state_is_refused(self):
        value_model = ValueModel.from_policy(policy(), "full")
        with pytest.raises(ValueError, match="no token"):
            value_model.score([[1], []])
        with pytest.raises(ValueError, match="cannot read tokens"):
            ValueModel.from_policy(policy(), "head").score([[1]])


class TestFiles:
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("kind", ["adapter", "full", "head"])
    def test_round_trip_on_a_given_policy(self, tmp_path, kind, lora):
        model = policy(lora)
        saved = ValueModel.from_policy(model, kind, lora_rank=2)
        for parameter in saved.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        saved.save_pretrained(tmp_path / "value_model")
        loaded = ValueModel.from_pretrained(tmp_path / "value_model", policy=model, dtype=torch.float32)
        expected = saved(hidden_states=hidden_states(model)) if kind == "head" else saved(IDS)
        assert expected.abs().min() > 0
        torch.testing.assert_close(loaded(IDS), expected)
        if kind != "head":
            again = ValueModel.from_policy(model, kind, lora_rank=2)
            again.load_weights(tmp_path / "value_model")
            torch.testing.assert_close(again(IDS), expected)
            assert {n for n, p in again.named_parameters() if p.requires_grad} == {
                n for n, p in saved.named_parameters() if p.requires_grad
            }

    def test_a_loaded_head_trains_alone_and_leaves_its_policy_as_it_is(self, tmp_path):
        model = policy().requires_grad_(True)
        saved = ValueModel.from_policy(model, "head")
        torch.nn.init.normal_(saved.head.weight)
        saved.save_pretrained(tmp_path)
        loaded = ValueModel.from_pretrained(tmp_path, policy=model, is_trainable=True)
        loaded(IDS, torch.ones_like(IDS)).square().sum().backward()
        assert loaded.head.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_what_is_no_value_model_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="the `value_model` folder inside a checkpoint"):
            ValueModel.from_pretrained(tmp_path)
        ValueModel.from_policy(policy(), "head").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Continue with `value_model='head'`"):
            ValueModel.from_policy(policy(), "full").load_weights(tmp_path)

    def test_an_adapter_on_a_nameless_base_says_what_to_pass(self, tmp_path):
        ValueModel.from_policy(policy(lora=True), "adapter", lora_rank=2).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Pass `policy=`"):
            ValueModel.from_pretrained(tmp_path)


class TestAttached:
    def attached(self, lora: bool = False, kind: str = "full"):
        model = policy(lora)
        _upstream.add_fused_lm_head(model.get_base_model() if lora else model, outputs=("log_probs", "entropy"))
        names = set(model.state_dict())
        attach_value_model(model, ValueModel.from_policy(model, kind, lora_rank=2))
        return model, names

    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("kind", ["adapter", "full", "head"])
    def test_the_policy_stays_a_policy(self, tmp_path, lora, kind):
        model, names = self.attached(lora, kind)
        assert set(model.state_dict()) == names
        result = model.load_state_dict(model.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        assert any(name.startswith("value_model.") for name, _ in model.named_parameters())
        assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 6)
        torch.testing.assert_close(model(IDS).logits, (twin := policy(lora)).eval()(IDS).logits)
        twin.save_pretrained(tmp_path / "plain")
        model.save_pretrained(tmp_path / "attached")
        name = "adapter_model.safetensors" if lora else "model.safetensors"
        sizes = [(tmp_path / folder / name).stat().st_size for folder in ("plain", "attached")]
        assert sizes[0] == sizes[1]

    def test_missing_keys_of_the_policy_itself_are_still_reported(self):
        model, _ = self.attached()
        state = model.state_dict()
        del state["lm_head.weight"]
        assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]

    def test_one_call_gives_log_probabilities_values_and_kl(self):
        model, _ = self.attached()
        torch.nn.init.normal_(model.value_model.head.weight)
        labels = IDS.clone()
        labels[0, :2] = -100
        other = tiny_model(byte_tokenizer(), seed=1).eval()
        with capture_hidden_states(decoder(other)) as captured:
            ref_logps = other(IDS).logits.log_softmax(dim=-1)
        outputs = model(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            labels=labels,
            values=True,
            ref_hidden=captured[0],
            ref_head=lm_head(other),
        )
        logps = model(IDS).logits.log_softmax(dim=-1)
        chosen = logps[:, :-1].gather(2, IDS[:, 1:, None]).squeeze(-1)
        kl = (logps.exp() * (logps - ref_logps)).sum(dim=-1)[:, :-1]
        chosen[0, 0] = kl[0, 0] = 0.0
        torch.testing.assert_close(outputs.log_probs, chosen)
        torch.testing.assert_close(outputs.kl, kl)
        torch.testing.assert_close(outputs.state_values, model.value_model(IDS)[:, :-1])


@pytest.mark.parametrize(
    ("config_class", "model_class", "options"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0, "head_dim": 8}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 3.0}),
    ],
)
def test_heads_that_scale_or_cap_their_logits(config_class, model_class, options):
    """KL of a model to itself is zero whatever the head does, so the reference here is the model's own logits."""
    sizes = dict(
        vocab_size=90, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = config_class(**sizes, num_key_value_heads=2, initializer_range=0.5, **options)
        models.append(model_class(config).eval())
    hidden, logps = [], []
    for model in models:
        with capture_hidden_states(decoder(model)) as captured:
            logps.append(model(IDS).logits.log_softmax(dim=-1))
        hidden.append(captured[0].flatten(0, 1))
    expected = (logps[0].exp() * (logps[0] - logps[1])).sum(dim=-1).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(full_vocab_kl(hidden[0], lm_head(models[0]), hidden[1], lm_head(models[1])), expected)

"""Every text architecture that transformers can build small from a configuration: what the pre-scan
writes down is the model's own, padded or not, or the class is refused by name.
SIMPLEDECO_ALL_MODELS=1 takes all of them instead of one in six"""
import inspect, os, zlib

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simpledeco.decode import attach, check_plain_logits, sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, read_output, sizes, takes_left_padding
from simpledeco.scan import _scan_batch

V = 320
# the names that configurations have for one thing, and a size that all architectures take
SIZES = dict(vocab_size=V, hidden_size=64, d_model=64, n_embd=64, dim=64, embedding_size=64,
             word_embed_proj_dim=64, intermediate_size=64, ffn_dim=64, n_inner=64,
             decoder_ffn_dim=64, encoder_ffn_dim=64, moe_intermediate_size=32,
             shared_expert_intermediate_size=32, expert_ffn_hidden_size=32,
             num_hidden_layers=4, n_layer=4, n_layers=4, num_layers=4, decoder_layers=2,
             encoder_layers=2, num_attention_heads=4, n_head=4, n_heads=4,
             num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
             n_positions=128, max_seq_len=128, num_experts=4, num_local_experts=4,
             n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
             q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16,
             v_head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXTRA = dict(minicpm3=dict(dim_model_base=16), opt=dict(word_embed_proj_dim=32),
             bert=dict(is_decoder=True), rwkv=dict(attention_hidden_size=64))
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CHOSEN = (KINDS if os.environ.get('SIMPLEDECO_ALL_MODELS')
          else [k for k in KINDS if k in EXTRA or zlib.crc32(k.encode()) % 6 == 0])


def small(kind):
    "A random model of a kind, with logits of several nats"
    default, extra = CONFIG_MAPPING[kind](), EXTRA.get(kind, {})
    of = lambda config: {k: v for k,v in SIZES.items() if isinstance(getattr(config, k, None), int)}
    text = getattr(default, 'text_config', None)
    sizes = of(default) if text is None else dict(text_config=text.to_dict() | of(text))
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | extra)).eval()
    if sum(w.numel() for w in model.parameters()) > 3e7: raise ValueError('too large for a test')
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(20)
    return model


def conversations():
    "Token ids and response positions of three texts of different lengths"
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, V, (n,), generator=generator).tolist() for n in (17, 11, 6)]
    return [(ids, list(range(4, len(ids)))) for ids in texts]


def own_gaps(model, ids, where):
    "z_max - z_true from the model's own logits, a text at a time and without padding"
    with torch.no_grad(): z = model(input_ids=torch.tensor([ids])).logits[0].float()
    return torch.stack([z[i-1].max() - z[i-1, ids[i]] for i in where])


@pytest.mark.parametrize('kind', CHOSEN)
def test_the_table_is_the_models_own_or_the_class_is_refused(kind):
    try: model = small(kind)
    except Exception as e: pytest.skip(f'cannot be built small: {type(e).__name__}: {str(e)[:80]}')
    try: check_plain_logits(model)
    except ValueError as e:
        assert type(model).__name__ in str(e)
        return
    texts = conversations()
    found = _scan_batch(model, texts, [0, 1, 2])
    wanted = torch.cat([own_gaps(model, *x) for x in texts])
    torch.testing.assert_close(found['z_max'] - found['z_true'], wanted, rtol=1e-3, atol=1e-3)
    assert found['hidden'].shape == (len(wanted), sizes(model)[0])
    with torch.no_grad():
        torch.testing.assert_close(model.get_output_embeddings()(found['hidden']).amax(-1),
                                   found['z_max'], rtol=1e-3, atol=1e-3)
    right = left_padded_is_right(model, texts)
    assert takes_left_padding(model) == right, 'what the check says of left padding is not so'


def left_padded_is_right(model, texts):
    "Whether a batch that is padded on the left gives each text the logits that it has alone"
    width, last = max(len(ids) for ids,_ in texts), lambda h: h[:, -1]
    ids = torch.tensor([[0]*(width - len(x)) + x for x,_ in texts])
    mask = torch.tensor([[0]*(width - len(x)) + [1]*len(x) for x,_ in texts])
    position = (dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0))
                if 'position_ids' in inspect.signature(model.forward).parameters else {})
    with torch.no_grad():
        padded = read_output(model, last, input_ids=ids, attention_mask=mask, use_cache=False,
                             **position)[1]
        alone = torch.cat([read_output(model, last, input_ids=torch.tensor([x]), use_cache=False)[1]
                           for x,_ in texts])
    return torch.allclose(padded, alone, rtol=1e-2, atol=1e-2*alone.std().item())


def test_a_head_fits_the_width_that_the_output_embedding_reads():
    "OPT projects a hidden state of 64 to 32 first"
    model = small('opt')
    assert sizes(model) == (32, V) and model.config.hidden_size == 64
    head = TemperatureHead(32, reads='hidden', base_model=fingerprint(model)).eval()
    with attach(model, head):
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3,
                              **sampling(head)).shape[1] > 3


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_logits_that_are_not_numbers_are_called_that(dtype):
    model = small('llama').to(dtype)
    with torch.no_grad(): model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match='LlamaForCausalLM gives logits that are NaN'):
        check_plain_logits(model)


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            'llama', **{k: SIZES[k] for k in ('vocab_size', 'hidden_size', 'num_hidden_layers')}))
    with pytest.raises(ValueError, match='offloaded'): check_plain_logits(model)


def test_an_adapter_is_scanned_with_its_own_weights():
    peft = pytest.importorskip('peft')
    model = small('llama')
    plain = torch.cat([own_gaps(model, *x) for x in conversations()])
    model = peft.get_peft_model(model,
                                peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj', 'lm_head'],
                                                init_lora_weights=False)).eval()
    check_plain_logits(model)
    wanted = torch.cat([own_gaps(model, *x) for x in conversations()])
    found = _scan_batch(model, conversations(), [0, 1, 2])
    torch.testing.assert_close(found['z_max'] - found['z_true'], wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted, plain, atol=.1)

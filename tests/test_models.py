"""Every text architecture that transformers can build small from a configuration: what the pre-scan writes is the model's own, padded or
not, or the class is refused by name. SIMPLEDECO_ALL_MODELS=1 takes all of them instead of one in six"""
import copy, inspect, json, os, zlib
from collections import Counter

import pytest, torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simpledeco.decode import attach, check_plain_logits, sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, keeps_all, read_output, sizes, takes_left_padding
from simpledeco.scan import _scan_batch, _scan_shard

V = 320
# the names that configurations have for one thing, and a size that all architectures take
SIZES = (dict.fromkeys(('hidden_size', 'd_model', 'n_embd', 'dim', 'embedding_size', 'word_embed_proj_dim'), 64)
         | dict.fromkeys(('intermediate_size', 'ffn_dim', 'n_inner', 'decoder_ffn_dim', 'encoder_ffn_dim'), 64)
         | dict.fromkeys(('moe_intermediate_size', 'shared_expert_intermediate_size', 'expert_ffn_hidden_size'), 32)
         | dict.fromkeys(('num_hidden_layers', 'n_layer', 'n_layers', 'num_layers'), 4)
         | dict.fromkeys(('num_attention_heads', 'n_head', 'n_heads', 'num_heads'), 4)
         | dict.fromkeys(('decoder_attention_heads', 'encoder_attention_heads'), 4)
         | dict.fromkeys(('max_position_embeddings', 'n_positions', 'max_seq_len'), 128)
         | dict.fromkeys(('num_experts', 'num_local_experts', 'n_routed_experts'), 4)
         | dict.fromkeys(('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'head_dim'), 16)
         | dict.fromkeys(('mamba_chunk_size', 'chunk_size'), 16)
         | dict(vocab_size=V, decoder_layers=2, encoder_layers=2, num_key_value_heads=2, num_experts_per_tok=2, n_group=1,
                topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2))
EXTRA = dict(minicpm3=dict(dim_model_base=16), opt=dict(word_embed_proj_dim=32), codegen=dict(rotary_dim=16),
             gptj=dict(rotary_dim=16), rwkv=dict(attention_hidden_size=64), gemma3={}, qwen3_next={})
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CHOSEN = (KINDS if os.environ.get('SIMPLEDECO_ALL_MODELS')
          else [k for k in KINDS if k in EXTRA or zlib.crc32(k.encode()) % 6 == 0])
FOUND = {} # {kind: what came of it}


@pytest.fixture(scope='module', autouse=True)
def report():
    yield
    counts = Counter(x.split(':')[0] for x in FOUND.values())
    print('\narchitectures by outcome:', dict(counts))
    if len(FOUND) == len(KINDS):
        (ROOT/'benchmarks/architectures.json').write_text(json.dumps(dict(counts, kinds=FOUND), indent=1) + '\n')


def small_sizes(config):
    "Those of SIZES that a configuration has; as many key heads as query heads where it has as many; a decoder"
    found = {k: v for k,v in SIZES.items() if isinstance(getattr(config, k, None), int)}
    if getattr(config, 'num_key_value_heads', 0) == getattr(config, 'num_attention_heads', None):
        found |= dict(num_key_value_heads=4)
    return found | (dict(is_decoder=True) if getattr(config, 'is_decoder', None) is False else {})


def small(kind):
    "A random model of a kind, with logits of several nats"
    default, extra = CONFIG_MAPPING[kind](), EXTRA.get(kind, {})
    text = getattr(default, 'text_config', None)
    sizes = small_sizes(default) if text is None else dict(text_config=text.to_dict() | small_sizes(text))
    config = AutoConfig.for_model(kind, **sizes | extra)
    with torch.device('meta'): drawn = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if sum(w.numel() for w in drawn.parameters()) > 3e7: raise ValueError('too large for a test')
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(20)
    return model


def conversations():
    "Token ids and response positions of three texts of different lengths"
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, V, (n,), generator=generator).tolist() for n in (17, 11, 6)]
    return [(ids, list(range(4, len(ids)))) for ids in texts]


def own_gaps(model, ids, where):
    "z_max - z_true from the model's own logits, a text at a time and without padding"
    with torch.no_grad(): z = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return torch.stack([z[i-1].max() - z[i-1, ids[i]] for i in where])


@pytest.mark.parametrize('kind', CHOSEN)
def test_the_table_is_the_models_own_or_the_class_is_refused(kind):
    FOUND[kind] = 'wrong' # until the end
    try: model = small(kind)
    except Exception as e:
        FOUND[kind] = f'not built small: {type(e).__name__}'
        pytest.skip(f'cannot be built small: {type(e).__name__}: {str(e)[:80]}')
    try: check_plain_logits(model)
    except ValueError as e:
        assert type(model).__name__ in str(e)
        FOUND[kind] = f'refused: {" ".join(str(e).split())}'
        return
    texts = conversations()
    check_table(model, texts)
    padded = takes_left_padding(model)
    assert padded == left_padded_is_right(model, texts), 'what the check says of left padding is not so'
    FOUND[kind] = 'right' if padded else 'right: one prompt at a time'


def check_table(model, texts):
    "What the pre-scan writes down is what the model gives, a text at a time"
    found = _scan_batch(model, texts, [0, 1, 2])
    wanted = torch.cat([own_gaps(model, *x) for x in texts])
    torch.testing.assert_close(found['z_max'] - found['z_true'], wanted, rtol=1e-3, atol=1e-3)
    alike = [(texts[0][0][:4] + ids[4:], where[1:]) for ids,where in texts] # these begin with the same words, which may be read once
    shard, own = _scan_shard(model, alike, 7, 24), torch.cat([own_gaps(model, *x) for x in alike])
    torch.testing.assert_close(shard['z_max'] - shard['z_true'], own, rtol=1e-3, atol=1e-3)
    assert shard['position'].tolist() == [i for _,where in alike for i in where] and {*shard['example'].tolist()} == {7, 8, 9}
    assert found['hidden'].shape == (len(wanted), sizes(model)[0])
    with torch.no_grad(): again = model.get_output_embeddings()(found['hidden']).amax(-1)
    torch.testing.assert_close(again, found['z_max'], rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize('kind', ['openai-gpt', 'rwkv'])
def test_a_model_without_a_cache_reads_every_text_whole(kind):
    model = small(kind)
    assert not keeps_all(model, 17)
    check_table(model, conversations())


def test_texts_without_a_response_are_no_harm():
    "They may be all that a batch holds, and the beginning of another"
    ids = conversations()[2][0]
    found = _scan_shard(small('llama'), [(ids[:4], []), (ids, [4, 5]), (ids[:4], [])], 0, 4)
    wanted = own_gaps(small('llama'), ids, [4, 5])
    torch.testing.assert_close(found['z_max'] - found['z_true'], wanted, rtol=1e-3, atol=1e-3)

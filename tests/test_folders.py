"""Folders of models as people have them, through every command that reads one: a result, or one line that names the cause,
before anything is written"""
import json, shutil, sys
from pathlib import Path

import pytest, torch
from test_cli import check_one_line, simpledeco, work # noqa: F401, a fixture
from conftest import ROOT
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from simpledeco.harness import SimpleDecoLM
from simpledeco.head import TemperatureHead
from simpledeco.look import token_report
from simpledeco.model import fingerprint, load_model
from simpledeco.train import fit
from simpledeco.table import TokenTable

MODEL = ROOT/'models/smoke'
REFUSES = "{{ raise_exception('only on Sundays') }}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def json_file(path, **change):
    "A JSON file with other values; None drops one"
    tree = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k,v in tree.items() if v is not None}))


def weights(folder, change):
    tensors = load_file(folder/'model.safetensors')
    change(tensors)
    save_file(tensors, folder/'model.safetensors', metadata=dict(format='pt'))


def fewer_rows(folder):
    model, _ = load_model(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def no_end(folder):
    _, tokenizer = load_model(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    for name in ('config.json', 'generation_config.json'): json_file(folder/name, eos_token_id=None)


def own_code(folder):
    (folder/'mine.py').write_text(f'from pathlib import Path\nPath({str(folder/"ran")!r}).touch()\n')
    mine = dict(AutoConfig='mine.C', AutoModelForCausalLM='mine.M')
    json_file(folder/'config.json', model_type='mine', auto_map=mine)


def soft_capped(folder):
    sizes = dict(vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16)
    AutoModelForCausalLM.from_config(AutoConfig.for_model('gemma2', **sizes)).save_pretrained(folder)


def cut_off(folder):
    file = folder/'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1000])


def template(text): return lambda folder: (folder/'chat_template.jinja').write_text(text)
def named(text): return lambda folder: (folder/'config.json').write_text(text)


BROKEN = {
    'a smaller embedding': (fewer_rows, "the model's vocabulary has 100"), 'no end': (no_end, 'no token ends an answer'),
    'a template that refuses': (template(REFUSES), 'only on Sundays'),
    'a template that is no template': (template('{% for %}'), 'the chat template refuses it'),
    'no template': (lambda f: (f/'chat_template.jinja').unlink(), 'no chat template'),
    'a missing weight': (lambda f: weights(f, lambda w: w.pop('model.layers.0.mlp.up_proj.weight')), 'lacks 1 of the weights'),
    'a weight of another shape': (lambda f: weights(f, lambda w: w.update({'model.norm.weight': torch.ones(7)})),
                                  'lacks 1 of the weights'),
    'NaN': (lambda f: weights(f, lambda w: w['model.norm.weight'].fill_(torch.nan)), 'NaN or infinite'),
    'cut off': (cut_off, 'truncated or corrupt'), 'code of its own': (own_code, 'code of its own'),
    'capped logits': (soft_capped, 'changes its logits'), 'no configuration': (named('{}'), 'cannot load'),
    'half a configuration': (named('{"model_ty'), 'cannot load'),
    'a context of four tokens': (lambda f: json_file(f/'config.json', max_position_embeddings=4), "the model's context is 4"),
}
COMMANDS = dict(prescan=['MODEL', 'x', '--data', 'talk.jsonl'], answer=['MODEL', 'x', '--data', 'ask.jsonl'],
                generate=['head', 'MODEL', 'What is 1 + 1?'],
                inspect=['head', 'MODEL', 'x', '--prompt', 'What is 1 + 1?', '--answer', 'It is 2.'])


@pytest.fixture(scope='module')
def files(work):
    "A conversation and a prompt, both of the training split"
    user = dict(role='user', content='What is 1 + 1?')
    talk = [user, dict(role='assistant', content='It is 2.')]
    (work/'talk.jsonl').write_text(json.dumps(dict(split='train', messages=talk)))
    (work/'ask.jsonl').write_text(json.dumps(dict(split='train', messages=[user], answer='2')))
    return work


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('kind', BROKEN)
def test_a_model_that_cannot_be_used_is_one_line(files, kind, command, tmp_path, monkeypatch):
    folder, (change, message) = shutil.copytree(MODEL, tmp_path/'model'), BROKEN[kind]
    change(folder)
    monkeypatch.setattr(sys, 'stdin', open('/dev/null'))
    arguments = [folder if a == 'MODEL' else a for a in COMMANDS[command]]
    check_one_line(simpledeco(command, *arguments, cwd=files, check=False), message)
    assert not (files/'x').exists() and not (folder/'ran').exists()


@pytest.mark.parametrize('command', ['prescan', 'answer'])
def test_a_template_that_refuses_a_system_turn_is_named_with_the_line(files, command, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path/'model')
    (folder/'chat_template.jinja').write_text(NO_SYSTEM + (folder/'chat_template.jinja').read_text())
    name = COMMANDS[command][-1]
    line = json.loads((files/name).read_text())
    second = line | dict(messages=[dict(role='system', content='be kind'), *line['messages']])
    (tmp_path/'two.jsonl').write_text('\n'.join(map(json.dumps, [line, second])))
    done = simpledeco(command, folder, 'x', '--data', tmp_path/'two.jsonl', cwd=files, check=False)
    lines = check_one_line(done, 'System role not supported')
    assert 'two.jsonl line 2' in lines[-1] and not (files/'x').exists()


@pytest.mark.parametrize('text', ['half an emoji: \udcf0', '\ud83d'])
def test_half_an_emoji_on_the_command_line_is_named(files, text):
    check_one_line(simpledeco('generate', 'head', MODEL, text, cwd=files, check=False), 'the prompt')
    done = simpledeco('inspect', 'head', MODEL, 'x', '--prompt', text, '--answer', 'a', cwd=files, check=False)
    check_one_line(done, '--prompt and --answer')
    assert not (files/'x').exists()


OWN = [dict(temperature=.1, top_k=1, do_sample=True), dict(top_p=.1, repetition_penalty=3.),
       dict(no_repeat_ngram_size=1, typical_p=.1), dict(do_sample=True, top_k=64, top_p=.95, cache_implementation='hybrid')]

@pytest.mark.parametrize('own', OWN, ids=str)
def test_generate_samples_the_same_whatever_the_model_ships(files, own, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path/'model')
    json_file(folder/'generation_config.json', **own)
    options = ['What is 1 + 1?', '--scale', '3', '--seed', '5', '--max-new-tokens', '24']
    texts = [simpledeco('generate', 'head', m, *options, cwd=files).stdout for m in (MODEL, folder)]
    assert texts[0] == texts[1] and texts[0].strip()


def test_inspect_ends_where_generate_ends(files, tmp_path):
    "The end of a turn is named by the generation configuration alone; what stands behind it is not part of the answer"
    model, tokenizer = load_model(MODEL)
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids('.')
    tokenizer.eos_token_id = other
    model.generation_config.eos_token_id = [end]
    talk = [dict(role='user', content='Who?'), dict(role='assistant', content='It is me')]
    report = token_report(model, tokenizer, TemperatureHead.from_pretrained(files/'head'), talk)
    assert report[-1]['text'] == tokenizer.decode([end]) and ''.join(x['text'] for x in report[:-1]) == 'It is me'


@pytest.mark.parametrize('command, arguments', [('train', ['tokens', 'x']), ('calibrate', ['head', 'tokens', 'x'])])
def test_one_unknown_corpus_among_known_ones_is_named(files, command, arguments):
    done = simpledeco(command, *arguments, '--corpus', 'sums', '--corpus', 'smus', cwd=files, check=False)
    check_one_line(done, 'has no corpus smus')
    assert not (files/'x').exists()


@pytest.mark.parametrize('lacks, command', [('train', 'train'), ('calibration', 'calibrate'), ('test', 'calibrate')])
def test_a_table_without_a_split_is_refused_before_the_work(files, lacks, command, tmp_path):
    talks = [json.loads(x) for x in (files/'sums.jsonl').read_text().splitlines()[:30]]
    splits = [s for s in ('train', 'calibration', 'test') if s != lacks]
    (tmp_path/'some.jsonl').write_text('\n'.join(json.dumps(x | dict(split=splits[i % 2])) for i,x in enumerate(talks)))
    simpledeco('prescan', MODEL, 't', '--data', 'some.jsonl', cwd=tmp_path)
    head = [files/'head'] if command == 'calibrate' else []
    check_one_line(simpledeco(command, *head, 't', 'x', cwd=tmp_path, check=False), lacks)
    assert not (tmp_path/'x').exists()


def test_odd_lines_for_training_are_enough(files, tmp_path):
    "Four hundred lines, whose odd ones are for training and the others for tests"
    talks = [json.loads(x) for x in (files/'sums.jsonl').read_text().splitlines()]*3
    lines = [json.dumps(x | dict(group=str(i), split=('train', 'test')[i % 2])) for i,x in enumerate(talks[:400])]
    (tmp_path/'odd.jsonl').write_text('\n'.join(lines))
    simpledeco('prescan', MODEL, 't', '--data', 'odd.jsonl', cwd=tmp_path)
    simpledeco('train', 't', 'h', '--steps', '5', cwd=tmp_path)
    assert (tmp_path/'h/model.safetensors').exists()


@pytest.mark.parametrize('name', ['a[b]c', '[/red]', 'x=1,y=2', 'ünï cödé', "it's", 'a:smile:b'])
def test_any_name_of_a_folder(files, name, tmp_path):
    "Names are printed as they are, and every command takes them"
    model = shutil.copytree(MODEL, tmp_path/name/'model')
    said = simpledeco('prescan', model, f'{name}/t', '--data', files/'sums.jsonl', '--max-examples', '20',
                      cwd=tmp_path).stdout
    said += simpledeco('train', f'{name}/t', f'{name}/h', '--risk', '.4', '--steps', '5', cwd=tmp_path).stdout
    said += simpledeco('calibrate', f'{name}/h', f'{name}/t', f'{name}/c', cwd=tmp_path).stdout
    simpledeco('generate', f'{name}/c', model, 'Hi', '--max-new-tokens', '2', cwd=tmp_path)
    said += simpledeco('inspect', f'{name}/c', model, f'{name}/p.html', '--prompt', 'Hi', '--answer', name,
                       cwd=tmp_path).stdout
    said += simpledeco('serve-dir', f'{name}/c', model, f'{name}/s', cwd=tmp_path).stdout
    for made in ('t', 'h', 'c', 'p.html', 's'): assert f'{name}/{made}: ' in said and (tmp_path/name/made).exists()


def test_a_model_that_takes_padding_for_text_is_not_run_in_batches(tmp_path):
    _, tokenizer = load_model(MODEL)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    model = RwkvForCausalLM(RwkvConfig(**sizes, eos_token_id=tokenizer.eos_token_id)).eval()
    for part in (model, tokenizer): part.save_pretrained(tmp_path/'m')
    TemperatureHead(32, base_model=fingerprint(model)).save_pretrained(tmp_path/'h')
    lm = lambda **kw: SimpleDecoLM(str(tmp_path/'m'), str(tmp_path/'h'), device='cpu', dtype='float32', **kw)
    with pytest.raises(ValueError, match='RwkvForCausalLM takes the padding of a batch for text'): lm(batch_size=4)
    with pytest.raises(ValueError, match='RwkvForCausalLM takes the padding'): lm(batch_size='auto')
    assert isinstance(lm(batch_size=1), HFLM)


def test_a_head_of_the_old_lines_is_the_head_of_the_new_ones(files, tmp_path):
    "The same conversations with Windows line ends, a mark in front and blank lines between: the same table and head"
    lines = (files/'sums.jsonl').read_text().splitlines()[:40]
    for name,text in (('plain', '\n'.join(lines)), ('windows', '\ufeff' + '\r\n\r\n'.join(lines) + '\r\n')):
        (tmp_path/name).mkdir()
        (tmp_path/name/'a.jsonl').write_bytes(text.encode())
        simpledeco('prescan', MODEL, f'{name}/t', '--data', f'{name}/a.jsonl', cwd=tmp_path)
    a, b = (TokenTable(tmp_path/name/'t') for name in ('plain', 'windows'))
    assert all(torch.equal(a[k], b[k]) for k in ('label', 'hidden', 'top_logits'))
    x, y = (fit(t, steps=3).state_dict() for t in (a, b))
    assert len(a) > 100 and all(torch.equal(x[k], y[k]) for k in x if k != 'mean' and k != 'std')


LINES = [b'\xff\xfe{\x00}', '{"messages": "é"}'.encode('latin-1'), b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
         b'{"messages": NaN}', b'[]', b'{"a": 1, "a": 2}', b'{', b'{"messages": []}',
         b'{"messages": [{"role": "assistant", "content": "hi"}]}', b'{"messages": [{"role": "user", "content": 3}]}',
         b'{"messages": [{"role": "user", "content": "x"}], "group": {"a": 1}}']

@pytest.mark.parametrize('bad', LINES)
@pytest.mark.parametrize('command', ['prescan', 'answer'])
def test_a_bad_line_is_named_before_the_model_is_loaded(files, bad, command, tmp_path, monkeypatch):
    monkeypatch.setattr('simpledeco.model.load_model', lambda *a, **kw: pytest.fail('the model was loaded'))
    good = (files/COMMANDS[command][-1]).read_bytes()
    (tmp_path/'b.jsonl').write_bytes(good + b'\n\n' + bad)
    done = simpledeco(command, MODEL, 'x', '--data', tmp_path/'b.jsonl', cwd=files, check=False)
    check_one_line(done, 'b.jsonl line 3')
    assert not Path(files/'x').exists()

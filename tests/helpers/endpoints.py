"""A local server that answers as an OpenAI-compatible endpoint does."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
    """A reply: text, the probabilities of its first token, or an error code with a message."""

    def __init__(self, text="", probabilities=None, code=200):
        self.text, self.probabilities, self.code = text, probabilities, code

    def body(self, logprobs):
        if self.code != 200:
            return {"error": {"message": self.text}}
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        if logprobs and self.probabilities is not None:
            top = [
                {"token": token, "logprob": math.log(max(p, 1e-12))}
                for token, p in self.probabilities.items()
            ]
            first = max(top, key=lambda one: one["logprob"])
            choice["logprobs"] = {"content": [{**first, "top_logprobs": top}]}
        return {"choices": [choice]}


@contextmanager
def serve(answer):
    """Serve `answer(request) -> Reply` on a free port; yields the address and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        # Headers and body in one packet: a second one would wait 40 ms for an acknowledgement.
        wbufsize = -1

        def do_POST(self):
            size = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(size))
            requests.append({**request, "headers": dict(self.headers), "path": self.path})
            reply = answer(request)
            content = json.dumps(reply.body(request.get("logprobs"))).encode()
            self.send_response(reply.code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

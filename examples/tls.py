# TLS without a proxy: the same app, as https:// and wss://.
#
#   Make a certificate for tests (browsers will warn, for nobody vouches for it):
#     openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 \
#       -keyout key.pem -out cert.pem -subj /CN=localhost -addext subjectAltName=DNS:localhost
#
#   Run:   python examples/tls.py --cert cert.pem --key key.pem
#   Open:  https://localhost:8443
#   See:   the echo page, on a wss:// address: a page that came by https may use no other.
#   Next:  --at-least-1.3, and `openssl s_client -connect localhost:8443 -tls1_2` is turned away.

import argparse
import ssl
from pathlib import Path

import roomsock

app = roomsock.App()


@app.get("/")
def page(request):
    return Path(__file__).with_name("echo.html")


@app.on_message("/echo")
async def echo(ws, text: str):
    await ws.send_text(text)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Echo over TLS.")
    options.add_argument("--cert", default="cert.pem")
    options.add_argument("--key", default="key.pem")
    options.add_argument("--at-least-1.3", dest="modern", action="store_true")
    given = options.parse_args()

    # Two files are enough. Whoever wants to decide more makes the context and passes that.
    tls: tuple[str, str] | ssl.SSLContext = (given.cert, given.key)
    if given.modern:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
        tls.load_cert_chain(given.cert, given.key)
    roomsock.run(app, host="localhost", port=8443, tls=tls)

"""`app`: a page to try models on: references in, images out. Needs the optional group `app` (Gradio)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pig.commands.app.examples import draw_examples
from pig.commands.app.studio import Studio
from pig.errors import InputError
from pig.methods import embedded_models, models_at
from pig.models.cutting_out import CuttingOut
from pig.models.names import DETECTOR, TOYWORLD, RembgModel
from pig.models.segmenters import find_sam

PASSWORD = "PIG_APP_PASSWORD"  # the environment variable: a command line can be read by others on the machine
LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_UPLOAD, MAX_WAITING = "20mb", 16


def app(
    model: str = TOYWORLD,
    host: str = "127.0.0.1",
    port: int = 7860,
    out: Path = Path("runs/app"),
    sam: str = TOYWORLD,
    detector: str = DETECTOR,
    rembg_model: RembgModel = "isnet-general-use",
) -> None:
    """Serve a page to draw with a model, with those of a folder, and with the embedded ones.

    Args:
        model: the model to begin with, or a folder of models: MODEL_FORMS.
        host: the address to serve at. Any but the local one asks for a password, which PIG_APP_PASSWORD holds; the
            user's name is `pig`.
        port: of the page.
        out: a folder for the pictures of the page's examples.
        sam: weights of the segmenter `sam`; see `generate`.
        detector: of the segmenter `grounded-sam`; see `generate`.
        rembg_model: of the segmenter `rembg`; see `generate`.
    """
    if not 0 < port < 65536:
        raise InputError(f"--port {port}: from 1 to 65535")
    password = os.environ.get(PASSWORD)
    if host not in LOCAL and not password:
        raise InputError(f"--host {host}: others could use this machine. Set {PASSWORD} to a password of your choice")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio

        from pig.commands.app.page import build_page
    except ImportError as error:
        raise InputError("the page needs Gradio: make app, or pip install 'pig[app]'") from error
    find_sam(sam)
    models = list(dict.fromkeys([*models_at(model), *embedded_models()]))
    examples = draw_examples(out / "examples")
    page = build_page(Studio(models, CuttingOut(sam=sam, detector=detector, rembg_model=rembg_model), examples))
    page.queue(max_size=MAX_WAITING)
    with socket.socket() as one:  # Gradio says it in a traceback
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise InputError(f"--port {port} at {host}: {error.strerror}; give another") from error
    page.launch(
        server_name=host,
        server_port=port,
        auth=("pig", password) if password else None,
        max_file_size=MAX_UPLOAD,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
    )

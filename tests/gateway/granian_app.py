"""The app that granian serves in `test_granian.py`; the servers' URLs come by the environment."""

from __future__ import annotations

import json
import os

from llmux_asgi import LLMuxApp

app = LLMuxApp({"models": json.loads(os.environ["LLMUX_TEST_MODELS"]), "policy": {"name": "fifo", "min_active_duration": 0}})

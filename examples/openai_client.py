"""An image and a sentence in, an MP4 out, with the `openai` client:

python examples/openai_client.py models/examples/red-circle.png "a red circle moves right quickly, static camera"
"""

import os
import sys
import warnings
from pathlib import Path

import openai

URL = os.environ.get("FASTLIGHTGEN_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("FASTLIGHTGEN_KEY", "none")  # the client wants one, also where the service does not
# It says of every call that OpenAI's own service ends.
warnings.filterwarnings("ignore", "The Sora API", DeprecationWarning)


def main(image: str, prompt: str) -> None:
    with openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=5) as client:
        video = client.videos.create_and_poll(prompt=prompt, input_reference=Path(image), extra_body={"seed": 7})
        if video.status != "completed":
            raise SystemExit(f"{video.status}: {video.error}")
        path = Path(f"{video.id}.mp4").resolve()
        client.videos.download_content(video.id).write_to_file(path)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Speed and memory of whole engines: `rowint8 bench engine`, `bench vllm`, `bench serve`, `rowint8 profile`."""

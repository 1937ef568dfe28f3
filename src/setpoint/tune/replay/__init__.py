"""The open-loop client: replays a trace against any OpenAI-compatible server, audits itself, finds capacity."""

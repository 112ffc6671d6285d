"""The HTTP server: OpenAI's completions and chat, with the exit depth of every token."""

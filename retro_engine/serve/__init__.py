"""The service: OpenAI's API, documents over HTTP, sign-in and keys, a web page."""

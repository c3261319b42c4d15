"""Running servers as sources of events: llama.cpp, vLLM and SGLang, told in the words of `record/events.py`. No torch."""

"""A dozen prompts of the kinds people give: writing, reasoning, extraction, translation, code, summary."""

PROMPTS = [
    "Explain how a lighthouse works.",
    "Write a Python function that merges two sorted lists, and explain each line.",
    "Summarise: The river rose for three days. On the fourth the dam held, the fifth it did not, and the town moved uphill.",
    "Translate into French: The library opens at nine and closes at six, except on Mondays.",
    "A train leaves at 14:10 and arrives at 17:45. How long is the journey? Think step by step.",
    "List five uses for an old bicycle wheel.",
    "Repeat this list twice: apple, pear, plum, cherry, apple, pear, plum, cherry.",
    "Extract the names and cities as JSON: Ana lives in Porto, Ben lives in Graz, and Chi lives in Hue.",
    "What is the difference between a virus and a bacterium?",
    "Write a haiku about a broken clock, then explain it.",
    "You are a pirate. Tell me how to bake bread.",
    "Context: The museum was founded in 1887 by Ida Holm. Question: Who founded the museum, and when?",
]

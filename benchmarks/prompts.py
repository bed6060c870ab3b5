"""What the servers and engines that are measured are asked."""

QUESTIONS = (
    "Tell me what a library is for, in plain words and at some length.",
    "Why does the sea look blue on some days and grey on others?",
    "Describe how bread is made, step by step.",
    "What should a person know before learning to sail?",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "How does a bicycle stay upright while it moves?",
    "Give me three reasons to learn a second language.",
    "Explain to a child what a government does.",
)

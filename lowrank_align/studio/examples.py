"""Prompts to begin with, for a queue that is empty."""

from lowrank_align.store import Text

COUNT_OF_TINY = 60
EVERYDAY = (
    "Explain the moon landing to a six-year-old.",
    "Write a short message to a neighbour whose music is too loud.",
    "What should I cook tonight with eggs, spinach and old bread?",
    "Give me three ways to start a conversation with a stranger on a train.",
    "Why is the sky blue? Answer in two sentences.",
    "Summarise the idea of compound interest for a teenager.",
    "Write a birthday greeting for a colleague I hardly know.",
    "What is the difference between weather and climate?",
    "Suggest a weekend plan for a rainy day with two children.",
    "Write a polite reply that declines a meeting.",
    "How do I get coffee stains out of a white shirt?",
    "Tell me a very short story that ends well.",
    "What are good questions to ask in a job interview?",
    "Explain what a prime number is, with an example.",
    "Help me say sorry to a friend whose birthday I forgot.",
    "Which three books would you give to somebody who never reads?",
    "How can I fall asleep faster?",
    "Write a haiku about a train station at night.",
    "What is the point of voting? Be brief and fair.",
    "Explain recursion without using the word itself.",
    "Plan a simple twenty-minute workout without equipment.",
    "How do I tell my boss that a deadline is not realistic?",
    "What makes bread rise?",
    "Write a product description for a plain wooden chair.",
    "Give me a metaphor for patience.",
    "How does a vaccine work?",
    "What should I look at before I rent a flat?",
    "Rewrite this to be kinder: 'Your report is late and full of mistakes.'",
    "Name a habit that is worth keeping, and say why.",
    "Explain the offside rule in football.",
    "How do noise-cancelling headphones work?",
    "Write the first sentence of a mystery novel.",
    "What can I do when a conversation turns into a quarrel?",
    "Describe the taste of a lemon to somebody who never had one.",
    "How do I start to learn a language on my own?",
    "What are the pros and cons of working from home?",
    "Give feedback on this sentence: 'Me and him goes to school everyday.'",
    "Explain inflation in simple words.",
    "Write a packing list for three days in the mountains.",
    "What would you ask a time traveller from 1900?",
)


def example_prompts(model: str) -> list[Text]:
    """Prompts that the model can say something to: `tiny` knows reviews only."""
    if model != "tiny":
        return [[{"role": "user", "content": text}] for text in EVERYDAY]
    from lowrank_align.tiny import prompts

    return list(prompts(COUNT_OF_TINY, seed=7))

"""What stands behind the page: answers, collecting, chatting, training, battles. No Gradio here, no browser needed."""

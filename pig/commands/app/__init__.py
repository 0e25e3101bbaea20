"""The page: `serve` starts it, `studio` is what it does, `page` how it looks in Gradio."""

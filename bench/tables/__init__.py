"""Result documents as Markdown: `<command>.render(document)` gives the lines below the line of conditions."""

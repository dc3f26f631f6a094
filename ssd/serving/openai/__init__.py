"""OpenAI's API: request bodies, jobs, generations, answers."""

"""Do the diagnostics of one posterior warn where its predictions fail?"""

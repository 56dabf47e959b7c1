def draw(r, o):
    pass

class Automaton:
    pass

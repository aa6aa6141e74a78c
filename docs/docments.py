"""What nbdev writes as comments, shown by mkdocstrings: a comment beside a parameter or a field is its description, and a
function with `@patch` is a method of the class that it patches."""
import ast, tokenize

from griffe import (Docstring, DocstringParameter, DocstringReturn, DocstringSectionParameters, DocstringSectionReturns,
                    Extension)


def comments(path):
    "{line: the comment at its end}"
    with open(path, 'rb') as f:
        found = [t for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT and t.line.strip() != t.string]
    return {t.start[0]: t.string.lstrip('# ') for t in found}


def patched(func):
    "The name of the class that a function patches, if it does"
    first = next(iter(func.parameters), None)
    if any(str(d.value).startswith('patch') for d in func.decorators): return str(first.annotation)


class Docments(Extension):
    def on_module_instance(self, *, node, mod, agent, **kwargs): self.comments = comments(mod.filepath)

    def on_function_instance(self, *, node, func, agent, **kwargs):
        beside = lambda x: x is not None and self.comments.get(x.end_lineno)
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        said = {a.arg: c for a in args if (c := beside(a))}
        params = [DocstringParameter(p.name, description=said.get(p.name, ''), annotation=p.annotation, value=p.default)
                  for p in func.parameters if p.name not in ('self', 'cls')]
        returned = beside(node.returns)
        if not (said or returned): return
        func.docstring = func.docstring or Docstring('', parent=func)
        sections = func.docstring.parsed
        if said: sections.append(DocstringSectionParameters(params))
        if returned:
            sections.append(DocstringSectionReturns([DocstringReturn('', description=returned, annotation=func.returns)]))

    def on_attribute_instance(self, *, node, attr, agent, **kwargs):
        said = self.comments.get(node.end_lineno)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute): attr.public = False # self.x = x
        if said and not attr.docstring: attr.docstring = Docstring(said, parent=attr)

    def on_package(self, *, pkg, loader, **kwargs):
        for module in [pkg, *pkg.modules.values()]: self.move(module)

    def move(self, module):
        "Patches into the classes of their module"
        for module in [module, *module.modules.values()]:
            for func in list(module.functions.values()):
                if not func.is_alias and (name := patched(func)) in module.classes:
                    module.del_member(func.name)
                    module.classes[name].set_member(func.name, func)
                    func.parameters[0].annotation = None

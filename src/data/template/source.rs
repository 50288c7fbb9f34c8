//! A template's source as it is compiled: what makes values larger is counted (see [`super::budget`]).
//!
//! minijinja bounds the steps of a template and not the values that they make, and calls nobody for its operators. So the
//! source is rewritten by the places of its expressions: `a ~ b` is a call of [`CONCAT`], and the results of `+`, `*`,
//! filters and slices pass through the filter [`KEPT`]. What walks through long values and keeps nothing (comparisons,
//! tests, a slice of which only a part is taken) has an operand that passes through [`TIMED`].

use std::collections::BTreeMap;

use minijinja::Error;
use minijinja::ErrorKind;
use minijinja::machinery::ast::{BinOp, BinOpKind, CallArg, Expr, Slice, Spanned, Stmt};
use minijinja::machinery::{Span, WhitespaceConfig, parse};
use minijinja::syntax::SyntaxConfig;

/// Python's `str` of everything it is given, one behind another.
pub const CONCAT: &str = "ferrotune_concat";
/// Its value as it is, counted.
pub const KEPT: &str = "ferrotune_kept";
/// Its value as it is, within the time.
pub const TIMED: &str = "ferrotune_timed";

/// Longest source.
const MAX_BYTES: usize = 1 << 20;
/// Operators behind one another without parentheses.
const MAX_RUN: usize = 200;
/// Of so many operators behind one another, the result of one is counted.
const COUNTED: usize = 8;
/// Text outside of tags that a template may write where a block, macro or loop catches it, in bytes.
const MAX_CAUGHT_BYTES: u64 = 1 << 30;

/// A template to be compiled, and the steps it may take.
pub struct Counted {
    pub source: String,
    pub steps: u64,
}

/// # Errors
/// A source that cannot be parsed or is too long.
pub fn counted(source: &str, steps: u64) -> Result<Counted, Error> {
    let fail = |message: String| Err(Error::new(ErrorKind::SyntaxError, message));
    if source.len() > MAX_BYTES {
        return fail(format!("it is longer than {} MiB", MAX_BYTES >> 20));
    }
    let whitespace = WhitespaceConfig {
        keep_trailing_newline: false,
        lstrip_blocks: true,
        trim_blocks: true,
    };
    let tree = parse(source, "template", SyntaxConfig, whitespace)?;
    let mut places = Places {
        source,
        edits: BTreeMap::new(),
        caught: 0,
        longest_run: 0,
    };
    places.statement(&tree, false);
    if places.longest_run > MAX_RUN {
        return fail(format!("more than {MAX_RUN} operators behind one another"));
    }
    let steps = steps.min(MAX_CAUGHT_BYTES / places.caught.max(1));
    Ok(Counted {
        source: places.apply(),
        steps,
    })
}

/// What is put into the source at one place.
#[derive(Default)]
struct Edit {
    /// Behind what ends here, the innermost first.
    kept: bool,
    timed: bool,
    closing: String,
    opening: String,
    /// Whether the character here is an operator that becomes a comma.
    comma: bool,
}

struct Places<'s> {
    source: &'s str,
    /// By byte.
    edits: BTreeMap<usize, Edit>,
    /// The longest text outside of tags that something catches.
    caught: u64,
    longest_run: usize,
}

impl Places<'_> {
    fn at(&mut self, byte: u32) -> &mut Edit {
        self.edits.entry(byte as usize).or_default()
    }

    fn wrap(&mut self, span: Span, before: &str, behind: &str) {
        // The outer expression is visited first.
        self.at(span.start_offset).opening.push_str(before);
        self.at(span.end_offset).closing.insert_str(0, behind);
    }

    fn keep(&mut self, span: Span) {
        self.at(span.end_offset).kept = true;
    }

    fn time(&mut self, span: Span) {
        self.at(span.end_offset).timed = true;
    }

    fn apply(self) -> String {
        let mut text = String::with_capacity(self.source.len() * 2);
        let mut from = 0;
        for (at, edit) in self.edits {
            text.push_str(&self.source[from..at]);
            if edit.kept || edit.timed {
                text.push('|');
                text.push_str(if edit.kept { KEPT } else { TIMED });
            }
            text.push_str(&edit.closing);
            text.push_str(&edit.opening);
            from = at;
            if edit.comma {
                text.push(',');
                from += 1;
            }
        }
        text.push_str(&self.source[from..]);
        text
    }

    fn statements(&mut self, statements: &[Stmt], caught: bool) {
        for statement in statements {
            self.statement(statement, caught);
        }
    }

    /// `caught` says whether something keeps what is written here.
    fn statement(&mut self, statement: &Stmt, caught: bool) {
        match statement {
            Stmt::Template(template) => self.statements(&template.children, caught),
            Stmt::EmitExpr(emit) => self.expression(&emit.expr),
            Stmt::EmitRaw(emit) if caught => self.caught = self.caught.max(emit.raw.len() as u64),
            Stmt::ForLoop(block) => {
                self.expression(&block.iter);
                self.optional(block.filter_expr.as_ref());
                self.statements(&block.body, caught || block.recursive);
                self.statements(&block.else_body, caught || block.recursive);
            }
            Stmt::IfCond(block) => {
                self.expression(&block.expr);
                self.statements(&block.true_body, caught);
                self.statements(&block.false_body, caught);
            }
            Stmt::WithBlock(block) => {
                for (_, value) in &block.assignments {
                    self.expression(value);
                }
                self.statements(&block.body, caught);
            }
            Stmt::Set(set) => self.expression(&set.expr),
            Stmt::SetBlock(block) => {
                self.optional(block.filter.as_ref());
                self.statements(&block.body, true);
            }
            Stmt::AutoEscape(block) => {
                self.expression(&block.enabled);
                self.statements(&block.body, caught);
            }
            Stmt::FilterBlock(block) => {
                self.expression(&block.filter);
                self.statements(&block.body, true);
            }
            Stmt::Block(block) => self.statements(&block.body, true),
            Stmt::Macro(block) => {
                self.expressions(&block.defaults);
                self.statements(&block.body, true);
            }
            Stmt::CallBlock(block) => {
                self.arguments(&block.call.args);
                self.expressions(&block.macro_decl.defaults);
                self.statements(&block.macro_decl.body, true);
            }
            Stmt::Do(block) => self.arguments(&block.call.args),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_)
            // No other template can be reached.
            | Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {}
        }
    }

    fn expressions(&mut self, expressions: &[Expr]) {
        for expression in expressions {
            self.expression(expression);
        }
    }

    fn optional(&mut self, expression: Option<&Expr>) {
        if let Some(expression) = expression {
            self.expression(expression);
        }
    }

    fn arguments(&mut self, arguments: &[CallArg]) {
        for argument in arguments {
            match argument {
                CallArg::Pos(value)
                | CallArg::Kwarg(_, value)
                | CallArg::PosSplat(value)
                | CallArg::KwargSplat(value) => self.expression(value),
            }
        }
    }

    fn expression(&mut self, expression: &Expr) {
        match expression {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(slice) => {
                self.expression(&slice.expr);
                self.optional(slice.start.as_ref());
                self.optional(slice.stop.as_ref());
                self.optional(slice.step.as_ref());
                // What a part of it is taken of at once is not held.
                let behind = &self.source[slice.span().end_offset as usize..];
                if behind.trim_start().starts_with(['.', '[', '(']) {
                    self.time_slice(slice);
                } else {
                    self.keep(slice.span());
                }
            }
            Expr::UnaryOp(operation) => self.expression(&operation.expr),
            Expr::BinOp(operation) => self.operation(operation, 0, false),
            Expr::Compare(comparison) => {
                self.expression(&comparison.expr);
                for operand in &comparison.ops {
                    self.expression(&operand.expr);
                    self.time(operand.expr.span());
                }
            }
            Expr::IfExpr(choice) => {
                self.expression(&choice.test_expr);
                self.time(choice.test_expr.span());
                self.expression(&choice.true_expr);
                self.optional(choice.false_expr.as_ref());
            }
            Expr::Filter(filter) => {
                self.optional(filter.expr.as_ref());
                self.arguments(&filter.args);
                self.keep(filter.span());
            }
            Expr::Test(test) => {
                self.expression(&test.expr);
                self.arguments(&test.args);
                if !test.args.is_empty() {
                    self.time(test.expr.span());
                }
            }
            Expr::GetAttr(part) => self.expression(&part.expr),
            Expr::GetItem(part) => {
                self.expression(&part.expr);
                self.expression(&part.subscript_expr);
            }
            Expr::Call(call) => {
                self.expression(&call.expr);
                self.arguments(&call.args);
            }
            Expr::List(list) => self.expressions(&list.items),
            Expr::Map(map) => {
                self.expressions(&map.keys);
                self.expressions(&map.values);
            }
        }
    }

    /// An operator with its operands; `run` operators without parentheses take its result as their left operand, the
    /// next of them a `~` where it is `joined`.
    fn operation(&mut self, operation: &Spanned<BinOp>, run: usize, joined: bool) {
        self.longest_run = self.longest_run.max(run);
        let concat = matches!(operation.op, BinOpKind::Concat);
        if concat && !joined {
            self.wrap(operation.span(), &format!("{CONCAT}("), ")");
        }
        if matches!(operation.op, BinOpKind::Add | BinOpKind::Mul) && run.is_multiple_of(COUNTED) {
            self.wrap(operation.span(), "(", &format!(")|{KEPT}"));
        }
        match &operation.left {
            Expr::BinOp(left) if left.span().start_offset == operation.span().start_offset => {
                self.operation(left, run + 1, concat);
            }
            left => self.expression(left),
        }
        if concat {
            let from = operation.left.span().end_offset as usize;
            if let Some(behind) = self.source[from..].find('~') {
                self.at((from + behind) as u32).comma = true;
            }
        }
        self.expression(&operation.right);
        match operation.op {
            // Their right operand may never be looked at.
            BinOpKind::ScAnd | BinOpKind::ScOr => self.time(operation.left.span()),
            BinOpKind::Eq | BinOpKind::Ne | BinOpKind::In => self.time(operation.right.span()),
            BinOpKind::Lt | BinOpKind::Lte | BinOpKind::Gt | BinOpKind::Gte => {
                self.time(operation.right.span());
            }
            _ => {}
        }
    }

    fn time_slice(&mut self, slice: &Spanned<Slice>) {
        let bounds = [&slice.start, &slice.stop, &slice.step];
        if let Some(bound) = bounds.into_iter().flatten().next() {
            self.time(bound.span());
        } else if let Some(bracket) = self.source[..slice.span().end_offset as usize].rfind('[') {
            // The whole, from its beginning.
            self.at(bracket as u32 + 1).opening.extend(["0|", TIMED]);
        }
    }
}

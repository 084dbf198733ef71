//! A Postgres expression over one foreign table → the engine's.
//!
//! In a plan, columns are attribute numbers and everything that is constant during an execution (parameters,
//! `now()`) is an engine parameter, evaluated when the scan starts; [`bind`] puts field ids and values in.

use std::collections::HashMap;

use pgrx::pg_sys::{self, NodeTag as T};
use rakam_engine::{CmpOp, Expr};
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use super::columns::field_type;
use super::node;
use super::shippable::{self, Local, Operator};
use super::values::{self, Value};

/// Deeper expressions stay with Postgres: each level is up to three of the plan's JSON, whose reader stops at 128.
const MAX_DEPTH: u32 = 30;

type Ship<T> = Result<T, Local>;

/// Collects the parameters of a plan while it translates.
pub struct Translator {
    relid: u32,
    /// Expressions without columns, to be evaluated when the scan starts; a parameter is an index into it.
    params: Vec<*mut pg_sys::Expr>,
    /// A column of the table that the engine makes only at the end and cannot filter by.
    made_last: Option<i16>,
    depth: u32,
}

/// One side of a comparison.
enum Side {
    Column(i32, FieldType),
    /// An expression without columns.
    Constant(*mut pg_sys::Node),
}

impl Translator {
    /// For the relation with this index in the range table.
    pub fn new(relid: u32) -> Self {
        Self {
            relid,
            params: Vec::new(),
            made_last: None,
            depth: 0,
        }
    }

    /// Conditions on this column stay with Postgres.
    pub fn without(mut self, attnum: Option<i16>) -> Self {
        self.made_last = attnum;
        self
    }

    pub fn into_params(self) -> Vec<*mut pg_sys::Expr> {
        self.params
    }

    /// A condition as the engine's, or why it has to stay with Postgres; then no parameter is left behind.
    ///
    /// # Safety
    /// `node` is an expression of the planner.
    pub unsafe fn top_condition(&mut self, node: *mut pg_sys::Node) -> Ship<Expr> {
        let before = self.params.len();
        // SAFETY: as promised by the caller.
        let result = unsafe { self.condition(node) };
        if result.is_err() {
            self.params.truncate(before);
        }
        result
    }

    /// Adds an expression without columns as a parameter, or says why it cannot be one.
    ///
    /// # Safety
    /// `node` is an expression of the planner.
    pub unsafe fn param(&mut self, node: *mut pg_sys::Node) -> Ship<usize> {
        // SAFETY: walkers over a valid expression.
        unsafe {
            if pg_sys::contain_var_clause(node) {
                return Err(Local::OtherTable);
            }
            if pg_sys::contain_volatile_functions(node) {
                return Err(Local::Volatile);
            }
            if pg_sys::contain_subplans(node) {
                return Err(Local::Subquery);
            }
        }
        self.params.push(node.cast());
        Ok(self.params.len() - 1)
    }

    unsafe fn condition(&mut self, node: *mut pg_sys::Node) -> Ship<Expr> {
        self.depth += 1;
        let result = if self.depth > MAX_DEPTH {
            Err(Local::Nested)
        } else {
            // SAFETY: as promised by the caller.
            unsafe { self.any_condition(node) }
        };
        self.depth -= 1;
        result
    }

    unsafe fn any_condition(&mut self, node: *mut pg_sys::Node) -> Ship<Expr> {
        // SAFETY: each cast follows the node's tag.
        unsafe {
            match node::tag(node) {
                T::T_Var | T::T_Const | T::T_Param => self.boolean(node),
                T::T_OpExpr => self.operator(node.cast()),
                T::T_ScalarArrayOpExpr => self.array_operator(node.cast()),
                T::T_BoolExpr => self.connective(node.cast()),
                T::T_NullTest => self.null_test(node.cast()),
                T::T_BooleanTest => self.boolean_test(node.cast()),
                T::T_FuncExpr => Err(Local::Function),
                T::T_SubPlan | T::T_AlternativeSubPlan => Err(Local::Subquery),
                _ => Err(Local::Expression),
            }
        }
    }

    /// A boolean column or constant as a condition.
    unsafe fn boolean(&mut self, node: *mut pg_sys::Node) -> Ship<Expr> {
        // SAFETY: `side` looks at the node by its tag.
        unsafe {
            match self.side(node)? {
                Side::Column(attnum, FieldType::Bool) => Ok(Expr::Column(attnum)),
                Side::Column(_, ty) => Err(Local::Type(ty.to_string())),
                Side::Constant(node) => self.constant(node, FieldType::Bool),
            }
        }
    }

    unsafe fn connective(&mut self, expr: *mut pg_sys::BoolExpr) -> Ship<Expr> {
        // SAFETY: a BoolExpr has a list of expressions.
        unsafe {
            let args = node::pointers::<pg_sys::Node>((*expr).args)
                .into_iter()
                .map(|arg| self.condition(arg))
                .collect::<Ship<Vec<_>>>()?;
            Ok(match (*expr).boolop {
                pg_sys::BoolExprType::AND_EXPR => Expr::And(args),
                pg_sys::BoolExprType::OR_EXPR => Expr::Or(args),
                _ => Expr::Not(Box::new(args.into_iter().next().ok_or(Local::Expression)?)),
            })
        }
    }

    unsafe fn null_test(&mut self, test: *mut pg_sys::NullTest) -> Ship<Expr> {
        // SAFETY: a NullTest has an argument.
        unsafe {
            if (*test).argisrow {
                return Err(Local::Expression);
            }
            let arg: *mut pg_sys::Node = (*test).arg.cast();
            let arg = match node::tag(arg) {
                T::T_Var => match self.side(arg)? {
                    Side::Column(attnum, _) => Expr::Column(attnum),
                    Side::Constant(_) => return Err(Local::Expression),
                },
                T::T_Const | T::T_Param => return Err(Local::Expression),
                _ => self.condition(arg)?,
            };
            Ok(match (*test).nulltesttype {
                pg_sys::NullTestType::IS_NULL => Expr::IsNull(Box::new(arg)),
                _ => Expr::IsNotNull(Box::new(arg)),
            })
        }
    }

    unsafe fn boolean_test(&mut self, test: *mut pg_sys::BooleanTest) -> Ship<Expr> {
        use pg_sys::BoolTestType as B;
        // SAFETY: a BooleanTest has an argument.
        unsafe {
            let expr = Box::new(self.condition((*test).arg.cast())?);
            let (value, negated) = match (*test).booltesttype {
                B::IS_TRUE => (Some(true), false),
                B::IS_NOT_TRUE => (Some(true), true),
                B::IS_FALSE => (Some(false), false),
                B::IS_NOT_FALSE => (Some(false), true),
                B::IS_UNKNOWN => (None, false),
                _ => (None, true),
            };
            Ok(Expr::Is {
                expr,
                value,
                negated,
            })
        }
    }

    unsafe fn operator(&mut self, expr: *mut pg_sys::OpExpr) -> Ship<Expr> {
        // SAFETY: an OpExpr has one or two arguments.
        unsafe {
            let operator = self.whitelisted((*expr).opno)?;
            let args = node::pointers::<pg_sys::Node>((*expr).args);
            let [left, right] = args[..] else {
                return Err(Local::Expression);
            };
            match operator {
                Operator::Cmp { op, text } => {
                    if text && !shippable::collation_fits(op, (*expr).inputcollid) {
                        return Err(Local::Collation);
                    }
                    self.comparison(op, left, right)
                }
                Operator::Like { negated } => {
                    if !shippable::is_deterministic((*expr).inputcollid) {
                        return Err(Local::Collation);
                    }
                    self.like(left, right, negated)
                }
            }
        }
    }

    fn whitelisted(&self, oid: pg_sys::Oid) -> Ship<Operator> {
        shippable::operator(oid).ok_or_else(|| {
            // SAFETY: format_operator gives a palloc'd text for any oid.
            Local::Operator(unsafe { node::text(pg_sys::format_operator(oid)) })
        })
    }

    unsafe fn comparison(
        &mut self,
        op: CmpOp,
        left: *mut pg_sys::Node,
        right: *mut pg_sys::Node,
    ) -> Ship<Expr> {
        // SAFETY: both are expressions of the planner.
        unsafe {
            let (left, right) = match (self.side(left)?, self.side(right)?) {
                (Side::Column(left, _), Side::Column(right, _)) => {
                    (Expr::Column(left), Expr::Column(right))
                }
                (Side::Column(left, ty), Side::Constant(right)) => {
                    (Expr::Column(left), self.constant(right, ty)?)
                }
                (Side::Constant(left), Side::Column(right, ty)) => {
                    (self.constant(left, ty)?, Expr::Column(right))
                }
                (Side::Constant(_), Side::Constant(_)) => return Err(Local::Expression),
            };
            Ok(Expr::Cmp {
                op,
                left: Box::new(left),
                right: Box::new(right),
            })
        }
    }

    unsafe fn like(
        &mut self,
        left: *mut pg_sys::Node,
        right: *mut pg_sys::Node,
        negated: bool,
    ) -> Ship<Expr> {
        // SAFETY: both are expressions of the planner; the cast follows the tag.
        unsafe {
            let Side::Column(attnum, _) = self.side(left)? else {
                return Err(Local::Expression);
            };
            if node::tag(right) != T::T_Const {
                return Err(Local::Pattern);
            }
            let constant: *mut pg_sys::Const = right.cast();
            let pattern = match values::scalar(
                (*constant).constvalue,
                (*constant).constisnull,
                FieldType::Text,
            ) {
                Some(Value::One(Some(Scalar::Text(pattern)))) => pattern,
                _ => return Err(Local::Pattern),
            };
            let like = Expr::Like {
                expr: Box::new(Expr::Column(attnum)),
                pattern: plain_escapes(&pattern).ok_or(Local::Pattern)?,
                negated,
            };
            match like.fits() {
                true => Ok(like),
                false => Err(Local::Pattern),
            }
        }
    }

    unsafe fn array_operator(&mut self, expr: *mut pg_sys::ScalarArrayOpExpr) -> Ship<Expr> {
        // SAFETY: a ScalarArrayOpExpr has two arguments.
        unsafe {
            let Operator::Cmp { op, text } = self.whitelisted((*expr).opno)? else {
                return Err(Local::Expression);
            };
            let negated = match (op, (*expr).useOr) {
                (CmpOp::Eq, true) => false,
                (CmpOp::Ne, false) => true,
                _ => return Err(Local::Expression),
            };
            if text && !shippable::collation_fits(op, (*expr).inputcollid) {
                return Err(Local::Collation);
            }
            let args = node::pointers::<pg_sys::Node>((*expr).args);
            let [left, right] = args[..] else {
                return Err(Local::Expression);
            };
            let Side::Column(attnum, ty) = self.side(left)? else {
                return Err(Local::Expression);
            };
            let Side::Constant(array) = self.side(right)? else {
                return Err(Local::Expression);
            };
            let column = Box::new(Expr::Column(attnum));
            let list = if node::tag(array) == T::T_Const {
                let constant: *mut pg_sys::Const = array.cast();
                let element = element_type((*constant).consttype, ty)?;
                let value = values::list((*constant).constvalue, (*constant).constisnull, element);
                match value.ok_or(Local::Value)? {
                    Value::Many(Some(items)) => items
                        .into_iter()
                        .map(|item| item.map_or(Expr::Null(element), Expr::Literal))
                        .collect(),
                    _ => return Ok(Expr::Null(FieldType::Bool)),
                }
            } else {
                let element = element_type(pg_sys::exprType(array), ty)?;
                // The whole list is one parameter, see `bind`.
                vec![self.parameter(array, element)?]
            };
            Ok(Expr::InList {
                expr: column,
                list,
                negated,
            })
        }
    }

    /// A constant side of a comparison with a column of type `ty`, as a value of its own type.
    unsafe fn constant(&mut self, node: *mut pg_sys::Node, ty: FieldType) -> Ship<Expr> {
        // SAFETY: the cast follows the node's tag.
        unsafe {
            let own = constant_type(pg_sys::exprType(node), ty)?;
            if node::tag(node) != T::T_Const {
                return self.parameter(node, own);
            }
            let constant: *mut pg_sys::Const = node.cast();
            match values::scalar((*constant).constvalue, (*constant).constisnull, own) {
                Some(Value::One(Some(scalar))) => Ok(Expr::Literal(scalar)),
                Some(_) => Ok(Expr::Null(own)),
                None => Err(Local::Value),
            }
        }
    }

    unsafe fn parameter(&mut self, node: *mut pg_sys::Node, ty: FieldType) -> Ship<Expr> {
        // A value that comes later may not be representable beside a column of full precision.
        if matches!(ty, FieldType::Numeric { precision: 38, .. }) {
            return Err(Local::Value);
        }
        // SAFETY: as promised by the caller.
        let index = unsafe { self.param(node)? };
        Ok(Expr::Param { index, ty })
    }

    unsafe fn side(&self, node: *mut pg_sys::Node) -> Ship<Side> {
        // SAFETY: each cast follows the node's tag.
        unsafe {
            match node::tag(node) {
                T::T_Var => {
                    let var: *mut pg_sys::Var = node.cast();
                    if (*var).varno as u32 != self.relid || (*var).varlevelsup != 0 {
                        return Err(Local::OtherTable);
                    }
                    if (*var).varattno <= 0 {
                        return Err(Local::SystemColumn);
                    }
                    if self.made_last == Some((*var).varattno) {
                        return Err(Local::MadeLast);
                    }
                    match field_type((*var).vartype, (*var).vartypmod) {
                        Some(ty) => Ok(Side::Column(i32::from((*var).varattno), ty)),
                        None => Err(Local::Type(type_name((*var).vartype))),
                    }
                }
                // `x COLLATE "C"`: what counts is the operator's collation.
                T::T_RelabelType => {
                    let relabel: *mut pg_sys::RelabelType = node.cast();
                    let arg: *mut pg_sys::Node = (*relabel).arg.cast();
                    if node::tag(arg) == T::T_Var
                        && (*relabel).resulttype == pg_sys::TEXTOID
                        && pg_sys::exprType(arg) == pg_sys::TEXTOID
                    {
                        return self.side(arg);
                    }
                    self.columnless(node)
                }
                _ => self.columnless(node),
            }
        }
    }

    unsafe fn columnless(&self, node: *mut pg_sys::Node) -> Ship<Side> {
        // SAFETY: walkers over a valid expression; the tag is the node's.
        unsafe {
            if !pg_sys::contain_var_clause(node) {
                return Ok(Side::Constant(node));
            }
            Err(match node::tag(node) {
                T::T_FuncExpr => Local::Function,
                T::T_OpExpr => {
                    let op: *mut pg_sys::OpExpr = node.cast();
                    Local::Operator(node::text(pg_sys::format_operator((*op).opno)))
                }
                _ => Local::Expression,
            })
        }
    }
}

/// The type in which a constant is compared with a column: its own, a numeric's being the column's.
fn constant_type(constant: pg_sys::Oid, column: FieldType) -> Ship<FieldType> {
    if constant == pg_sys::NUMERICOID && matches!(column, FieldType::Numeric { .. }) {
        return Ok(column);
    }
    field_type(constant, -1).ok_or_else(|| Local::Type(type_name(constant)))
}

fn element_type(array: pg_sys::Oid, column: FieldType) -> Ship<FieldType> {
    // SAFETY: a catalog look-up by oid.
    constant_type(unsafe { pg_sys::get_element_type(array) }, column)
}

fn type_name(oid: pg_sys::Oid) -> String {
    // SAFETY: format_type_be gives a palloc'd text for any oid.
    unsafe { node::text(pg_sys::format_type_be(oid)) }
}

/// The pattern with `\` only where it changes something; None if it ends in a single one.
fn plain_escapes(pattern: &str) -> Option<String> {
    let mut plain = String::with_capacity(pattern.len());
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        let escaped = chars.next()?;
        if matches!(escaped, '%' | '_' | '\\') {
            plain.push('\\');
        }
        plain.push(escaped);
    }
    Some(plain)
}

/// Puts fields in the place of columns (NULL where the collection has no such field) and values in the place of
/// parameters. `values` has one entry per parameter of the plan.
pub fn bind(expr: Expr, fields: &HashMap<i32, Expr>, values: &[Value]) -> Expr {
    let bind_box = |e: Box<Expr>| Box::new(bind(*e, fields, values));
    let bind_all = |list: Vec<Expr>| -> Vec<Expr> {
        list.into_iter().map(|e| bind(e, fields, values)).collect()
    };
    match expr {
        Expr::Column(attnum) => fields
            .get(&attnum)
            .cloned()
            .unwrap_or(Expr::Null(FieldType::Bool)),
        Expr::Param { index, ty } => match values.get(index) {
            Some(Value::One(Some(scalar))) => Expr::Literal(scalar.clone()),
            _ => Expr::Null(ty),
        },
        Expr::Cmp { op, left, right } => Expr::Cmp {
            op,
            left: bind_box(left),
            right: bind_box(right),
        },
        Expr::And(list) => Expr::And(bind_all(list)),
        Expr::Or(list) => Expr::Or(bind_all(list)),
        Expr::Not(e) => Expr::Not(bind_box(e)),
        Expr::IsNull(e) => Expr::IsNull(bind_box(e)),
        Expr::IsNotNull(e) => Expr::IsNotNull(bind_box(e)),
        Expr::Is {
            expr,
            value,
            negated,
        } => Expr::Is {
            expr: bind_box(expr),
            value,
            negated,
        },
        Expr::InList {
            expr,
            list,
            negated,
        } => {
            let list = match list[..] {
                [Expr::Param { index, ty }] => match values.get(index) {
                    Some(Value::Many(Some(items))) => items
                        .iter()
                        .map(|item| item.clone().map_or(Expr::Null(ty), Expr::Literal))
                        .collect(),
                    // `x = ANY (NULL)` is NULL whatever x is.
                    _ => return Expr::Null(FieldType::Bool),
                },
                _ => list,
            };
            Expr::InList {
                expr: bind_box(expr),
                list,
                negated,
            }
        }
        Expr::Like {
            expr,
            pattern,
            negated,
        } => Expr::Like {
            expr: bind_box(expr),
            pattern,
            negated,
        },
        other @ (Expr::Literal(_) | Expr::Null(_)) => other,
    }
}

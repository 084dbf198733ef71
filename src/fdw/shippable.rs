//! Which operators mean the same in the engine as in Postgres, and why a condition stays with Postgres.
//!
//! The whitelist is by operator oid, which stands for name and argument types; it is resolved in pg_catalog once
//! per backend. Whatever is not on it is evaluated by Postgres: an answer never depends on what is pushed down.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;

use pgrx::pg_sys;
use rakam_engine::CmpOp;

/// Objects below this oid come with Postgres and mean what they meant when this was written.
const FIRST_FOREIGN_OID: u32 = pg_sys::FirstGenbkiObjectId;

/// An operator the engine has too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    Cmp { op: CmpOp, text: bool },
    Like { negated: bool },
}

const COMPARISONS: [(&CStr, CmpOp); 6] = [
    (c"=", CmpOp::Eq),
    (c"<>", CmpOp::Ne),
    (c"<", CmpOp::Lt),
    (c"<=", CmpOp::Le),
    (c">", CmpOp::Gt),
    (c">=", CmpOp::Ge),
];

/// Argument types of the comparisons: integers widen exactly, everything else meets its own type only. A date
/// against a timestamptz depends on the session's TimeZone.
const COMPARED: [(pg_sys::Oid, pg_sys::Oid); 12] = [
    (pg_sys::BOOLOID, pg_sys::BOOLOID),
    (pg_sys::INT4OID, pg_sys::INT4OID),
    (pg_sys::INT8OID, pg_sys::INT8OID),
    (pg_sys::INT4OID, pg_sys::INT8OID),
    (pg_sys::INT8OID, pg_sys::INT4OID),
    (pg_sys::FLOAT4OID, pg_sys::FLOAT4OID),
    (pg_sys::FLOAT8OID, pg_sys::FLOAT8OID),
    (pg_sys::NUMERICOID, pg_sys::NUMERICOID),
    (pg_sys::TEXTOID, pg_sys::TEXTOID),
    (pg_sys::DATEOID, pg_sys::DATEOID),
    (pg_sys::TIMESTAMPTZOID, pg_sys::TIMESTAMPTZOID),
    (pg_sys::UUIDOID, pg_sys::UUIDOID),
];

thread_local! {
    static OPERATORS: OnceCell<HashMap<u32, Operator>> = const { OnceCell::new() };
}

/// The engine's operator for this one of Postgres, if it has it.
pub fn operator(oid: pg_sys::Oid) -> Option<Operator> {
    OPERATORS.with(|operators| operators.get_or_init(resolve).get(&oid.to_u32()).copied())
}

fn resolve() -> HashMap<u32, Operator> {
    let mut operators = HashMap::new();
    let mut add = |name: &CStr, left, right, operator| {
        let oid = look_up(name, left, right).to_u32();
        if oid != 0 && oid < FIRST_FOREIGN_OID {
            operators.insert(oid, operator);
        }
    };
    for (left, right) in COMPARED {
        for (name, op) in COMPARISONS {
            let text = left == pg_sys::TEXTOID;
            add(name, left, right, Operator::Cmp { op, text });
        }
    }
    let text = pg_sys::TEXTOID;
    add(c"~~", text, text, Operator::Like { negated: false });
    add(c"!~~", text, text, Operator::Like { negated: true });
    operators
}

/// The operator of pg_catalog with this name and these argument types; 0 if there is none.
fn look_up(name: &CStr, left: pg_sys::Oid, right: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a syscache look-up by NUL-terminated name and oids.
    unsafe {
        pg_sys::GetSysCacheOid(
            pg_sys::SysCacheIdentifier::OPERNAMENSP as i32,
            pg_sys::Anum_pg_operator_oid as i16,
            pg_sys::Datum::from(name.as_ptr()),
            pg_sys::Datum::from(left),
            pg_sys::Datum::from(right),
            pg_sys::Datum::from(pg_sys::Oid::from(pg_sys::PG_CATALOG_NAMESPACE)),
        )
    }
}

/// Collation "POSIX"; the server has no name for it from 18 on.
const POSIX_COLLATION: u32 = 951;

/// Whether text compares under this collation as the engine compares it.
pub fn collation_fits(op: CmpOp, collation: pg_sys::Oid) -> bool {
    match op {
        CmpOp::Eq | CmpOp::Ne => is_deterministic(collation),
        // By bytes.
        CmpOp::Lt | CmpOp::Le | CmpOp::Gt | CmpOp::Ge => {
            collation == pg_sys::C_COLLATION_OID || collation == pg_sys::Oid::from(POSIX_COLLATION)
        }
    }
}

/// Whether equal text under this collation is the same bytes.
pub fn is_deterministic(collation: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up by the oid of a collation that the parser has found.
    collation != pg_sys::InvalidOid && unsafe { pg_sys::get_collation_isdeterministic(collation) }
}

/// Why a condition stays with Postgres.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Local {
    PushdownOff,
    SecurityBarrier,
    Operator(String),
    Function,
    Collation,
    Type(String),
    SystemColumn,
    Volatile,
    Subquery,
    OtherTable,
    MadeLast,
    Pattern,
    Value,
    Nested,
    Expression,
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PushdownOff => "rakam.enable_pushdown is off",
            Self::SecurityBarrier => "a security barrier comes first",
            Self::Operator(name) => return write!(f, "the engine has no operator {name}"),
            Self::Function => "it calls a function",
            Self::Collation => "its collation is not \"C\"",
            Self::Type(name) => return write!(f, "the engine does not compare type {name}"),
            Self::SystemColumn => "it uses a system column or the whole row",
            Self::Volatile => "it is volatile",
            Self::Subquery => "it has a subquery",
            Self::OtherTable => "it uses another table",
            Self::MadeLast => "the column is put together after filtering",
            Self::Pattern => {
                "the pattern is not a constant, is very long, or ends in its escape character"
            }
            Self::Value => "the constant is beyond what the column's type can hold exactly",
            Self::Nested => "it is nested too deeply",
            Self::Expression => "the engine has no such expression",
        })
    }
}

//! The planner's callbacks.
//!
//! A plan reads the columns that the query or a local condition needs, with the conditions that mean the same in
//! the engine. A LIMIT right above the scan is told to the engine too; Postgres' own Limit node stays on top, so
//! OFFSET, negative counts and NULLs keep their exact meaning.

use pgrx::{pg_guard, pg_sys};
use rakam_engine::Expr;
use serde::{Deserialize, Serialize};

use super::shippable::Local;
use super::translate::Translator;
use super::{cost, node, options};
use crate::pg::error::OrRaise;
use crate::pg::{PgError, guc, security};

/// What a plan carries to the executor, as JSON in its private list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScanSpec {
    /// Attribute numbers of the columns to read, ascending.
    pub columns: Vec<i16>,
    /// The conditions of the engine; columns are attribute numbers.
    pub filter: Option<Expr>,
    pub limit: Option<Limit>,
    /// Why each condition that is left stays with Postgres, in the order of the plan's qual.
    pub local: Vec<String>,
}

/// Indexes of the plan's parameters that hold LIMIT and OFFSET.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Limit {
    pub count: usize,
    pub offset: Option<usize>,
}

impl ScanSpec {
    /// # Safety
    /// `scan` is a plan node that [`plan`] made, or a copy of it.
    pub unsafe fn of(scan: *mut pg_sys::ForeignScan) -> Self {
        // SAFETY: the private list is the one made by `plan`.
        let json = unsafe { node::list_string((*scan).fdw_private) };
        serde_json::from_str(&json)
            .map_err(|e| PgError::internal(format!("unreadable plan of a foreign scan: {e}")))
            .or_raise()
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn rel_size(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    table: pg_sys::Oid,
) {
    // SAFETY: the planner's own structures.
    unsafe {
        // The estimate is what this role may know: another role gets its own plan.
        (*(*root).glob).dependsOnRole = true;
        let user = if (*rel).userid == pg_sys::InvalidOid {
            security::current_user()
        } else {
            (*rel).userid
        };
        (*rel).tuples = cost::rows(&options::of_table(table), user);
        pg_sys::set_baserel_size_estimates(root, rel);
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn paths(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    _table: pg_sys::Oid,
) {
    // SAFETY: the planner's own structures; the path is allocated in the planner's context.
    unsafe {
        let (startup, total) = cost::scan((*rel).tuples, (*rel).rows, (*rel).baserestrictcost);
        let path = pg_sys::create_foreignscan_path(
            root,
            rel,
            std::ptr::null_mut(),
            (*rel).rows,
            #[cfg(feature = "pg18")]
            0,
            startup,
            total,
            std::ptr::null_mut(),
            (*rel).lateral_relids,
            std::ptr::null_mut(),
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
        pg_sys::add_path(rel, path.cast());
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn plan(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    table: pg_sys::Oid,
    _path: *mut pg_sys::ForeignPath,
    tlist: *mut pg_sys::List,
    scan_clauses: *mut pg_sys::List,
    outer_plan: *mut pg_sys::Plan,
) -> *mut pg_sys::ForeignScan {
    // SAFETY: the planner's own structures.
    unsafe {
        let made_last = if options::of_table(table).is_all() {
            match pg_sys::get_attnum(table, c"properties".as_ptr()) {
                0 => None,
                attnum => Some(attnum),
            }
        } else {
            None
        };
        let mut translator = Translator::new((*rel).relid).without(made_last);
        let conditions = classify(rel, scan_clauses, &mut translator);
        let limit = if conditions.local.is_null() && guc::enable_pushdown() {
            limit(root, rel, &mut translator)
        } else {
            None
        };
        let spec = ScanSpec {
            columns: needed_columns(rel, conditions.local),
            filter: match conditions.shipped.len() {
                0 => None,
                1 => conditions.shipped.into_iter().next(),
                _ => Some(Expr::And(conditions.shipped)),
            },
            limit,
            local: conditions.reasons.iter().map(Local::to_string).collect(),
        };
        let json = serde_json::to_string(&spec)
            .map_err(|e| PgError::internal(e.to_string()))
            .or_raise();
        let params = translator
            .into_params()
            .into_iter()
            .fold(std::ptr::null_mut(), |list, param| {
                pg_sys::lappend(list, param.cast())
            });
        pg_sys::make_foreignscan(
            tlist,
            conditions.local,
            (*rel).relid,
            params,
            node::string_list(&json),
            std::ptr::null_mut(),
            conditions.remote,
            outer_plan,
        )
    }
}

struct Conditions {
    /// What the engine evaluates, and the same as expressions of Postgres.
    shipped: Vec<Expr>,
    remote: *mut pg_sys::List,
    /// What Postgres evaluates, with the reasons in the same order.
    local: *mut pg_sys::List,
    reasons: Vec<Local>,
}

unsafe fn classify(
    rel: *mut pg_sys::RelOptInfo,
    scan_clauses: *mut pg_sys::List,
    translator: &mut Translator,
) -> Conditions {
    let mut conditions = Conditions {
        shipped: Vec::new(),
        remote: std::ptr::null_mut(),
        local: std::ptr::null_mut(),
        reasons: Vec::new(),
    };
    // SAFETY: scan clauses are RestrictInfo nodes.
    unsafe {
        for info in node::pointers::<pg_sys::RestrictInfo>(scan_clauses) {
            if (*info).pseudoconstant {
                continue;
            }
            let clause = (*info).clause;
            let shipped = if !guc::enable_pushdown() {
                Err(Local::PushdownOff)
            } else if (*info).security_level > (*rel).baserestrict_min_security
                && !(*info).leakproof
            {
                Err(Local::SecurityBarrier)
            } else {
                translator.top_condition(clause.cast())
            };
            match shipped {
                Ok(expr) => {
                    conditions.shipped.push(expr);
                    conditions.remote = pg_sys::lappend(conditions.remote, clause.cast());
                }
                Err(reason) => {
                    conditions.reasons.push(reason);
                    conditions.local = pg_sys::lappend(conditions.local, clause.cast());
                }
            }
        }
    }
    conditions
}

/// The columns that the query's upper part or a local condition uses; all of them for a whole row.
unsafe fn needed_columns(rel: *mut pg_sys::RelOptInfo, local: *mut pg_sys::List) -> Vec<i16> {
    let mut used: *mut pg_sys::Bitmapset = std::ptr::null_mut();
    let mut columns = Vec::new();
    // SAFETY: walkers over the planner's expressions; attribute numbers in the set are shifted to be positive.
    unsafe {
        pg_sys::pull_varattnos((*(*rel).reltarget).exprs.cast(), (*rel).relid, &mut used);
        pg_sys::pull_varattnos(local.cast(), (*rel).relid, &mut used);
        let mut member = -1;
        loop {
            member = pg_sys::bms_next_member(used, member);
            if member < 0 {
                break;
            }
            match member + pg_sys::FirstLowInvalidHeapAttributeNumber {
                0 => return (1..=(*rel).max_attr).collect(),
                attnum if attnum > 0 => columns.push(attnum as i16),
                _ => {}
            }
        }
    }
    columns
}

/// LIMIT and OFFSET, if every row of this scan is a row of the query's result.
unsafe fn limit(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    translator: &mut Translator,
) -> Option<Limit> {
    // SAFETY: the planner's own structures.
    unsafe {
        let query = (*root).parse;
        let plain = (*query).commandType == pg_sys::CmdType::CMD_SELECT
            && (*rel).reloptkind == pg_sys::RelOptKind::RELOPT_BASEREL
            && pg_sys::bms_membership((*root).all_baserels)
                == pg_sys::BMS_Membership::BMS_SINGLETON
            && (*query).limitOption == pg_sys::LimitOption::LIMIT_OPTION_COUNT
            && (*query).sortClause.is_null()
            && (*query).distinctClause.is_null()
            && (*query).groupClause.is_null()
            && (*query).groupingSets.is_null()
            && (*query).windowClause.is_null()
            && (*query).havingQual.is_null()
            && (*query).setOperations.is_null()
            && (*query).rowMarks.is_null()
            && !(*query).hasAggs
            && !(*query).hasWindowFuncs
            && !(*query).hasTargetSRFs;
        if !plain || (*query).limitCount.is_null() {
            return None;
        }
        let count = translator.param((*query).limitCount).ok()?;
        let offset = match (*query).limitOffset.is_null() {
            true => None,
            false => Some(translator.param((*query).limitOffset).ok()?),
        };
        Some(Limit { count, offset })
    }
}

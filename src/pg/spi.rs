//! Raw SPI with saved plans, under a snapshot the caller chooses and with a pinned search path.
//!
//! pgrx' own `Spi` turns a read-only query into a writing one (with a new snapshot) as soon as the
//! transaction has an xid, so it cannot promise one snapshot over several reads; this one can.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString};

use pgrx::datum::{FromDatum, IntoDatum};
use pgrx::pg_sys;

use super::error::{PgError, Result};
use super::settings::save;
use super::snapshot::Snapshot;

/// One argument: its type and value.
#[derive(Clone, Copy)]
pub struct Arg(pg_sys::Oid, Option<pg_sys::Datum>);

/// Anything that has a Postgres type of its own.
pub fn arg<T: IntoDatum>(value: T) -> Arg {
    Arg(T::type_oid(), value.into_datum())
}

/// A 64-bit transaction id.
pub fn xid8(value: u64) -> Arg {
    Arg(pg_sys::XID8OID, Some(pg_sys::Datum::from(value)))
}

/// An array of 64-bit transaction ids, in the caller's memory context.
pub fn xid8_array(values: &[u64]) -> Arg {
    let mut datums: Vec<pg_sys::Datum> = values.iter().map(|&v| pg_sys::Datum::from(v)).collect();
    // SAFETY: construct_array copies the elements; xid8 is 8 bytes, by value, double-aligned.
    let array = unsafe {
        pg_sys::construct_array(
            datums.as_mut_ptr(),
            datums.len() as i32,
            pg_sys::XID8OID,
            8,
            true,
            b'd' as std::ffi::c_char,
        )
    };
    Arg(pg_sys::XID8ARRAYOID, Some(pg_sys::Datum::from(array)))
}

/// Microseconds since 1970 as timestamptz.
pub fn timestamptz(unix_us: i64) -> Arg {
    Arg(
        pg_sys::TIMESTAMPTZOID,
        Some(pg_sys::Datum::from(unix_us - super::PG_EPOCH_US)),
    )
}

/// An array of times in microseconds since 1970 as timestamptz, in the caller's memory context; the extremes are infinity.
pub fn timestamptz_array(unix_us: &[i64]) -> Arg {
    let mut datums: Vec<pg_sys::Datum> = unix_us
        .iter()
        .map(|&us| pg_sys::Datum::from(saturating(us)))
        .collect();
    // SAFETY: construct_array copies the elements; timestamptz is 8 bytes, by value, double-aligned.
    let array = unsafe {
        pg_sys::construct_array(
            datums.as_mut_ptr(),
            datums.len() as i32,
            pg_sys::TIMESTAMPTZOID,
            8,
            true,
            b'd' as std::ffi::c_char,
        )
    };
    Arg(
        pg_sys::TIMESTAMPTZARRAYOID,
        Some(pg_sys::Datum::from(array)),
    )
}

/// As [`timestamptz`], with anything beyond its range becoming infinity.
pub fn timestamptz_saturating(unix_us: i64) -> Arg {
    Arg(
        pg_sys::TIMESTAMPTZOID,
        Some(pg_sys::Datum::from(saturating(unix_us))),
    )
}

fn saturating(unix_us: i64) -> i64 {
    match unix_us {
        i64::MIN | i64::MAX => unix_us,
        us => us.saturating_sub(super::PG_EPOCH_US),
    }
}

/// As [`timestamptz`], of a time that may be unknown.
pub fn timestamptz_or_null(unix_us: Option<i64>) -> Arg {
    let value = unix_us.map(|us| pg_sys::Datum::from(us - super::PG_EPOCH_US));
    Arg(pg_sys::TIMESTAMPTZOID, value)
}

/// A value of any type by its datum, for instance one that came in as a function's argument.
pub fn datum(ty: pg_sys::Oid, value: Option<pg_sys::Datum>) -> Arg {
    Arg(ty, value)
}

/// One result row, valid inside the callback only: getters copy. Columns count from 1.
pub struct Row {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
}

impl Row {
    fn datum(&self, column: usize) -> Option<pg_sys::Datum> {
        let mut is_null = false;
        // SAFETY: tuple and descriptor belong to the live SPI_tuptable; an unknown column gives NULL.
        let datum =
            unsafe { pg_sys::SPI_getbinval(self.tuple, self.desc, column as i32, &mut is_null) };
        (!is_null).then_some(datum)
    }

    /// A column by its Rust type; NULL is None. The query decides the type, so it is ours to match.
    pub fn get<T: FromDatum>(&self, column: usize) -> Option<T> {
        let datum = self.datum(column)?;
        // SAFETY: the datum is not NULL and of the type the query's text gives it.
        unsafe { T::from_datum(datum, false) }
    }

    /// A column that cannot be NULL.
    pub fn must<T: FromDatum>(&self, column: usize) -> Result<T> {
        self.get(column).ok_or_else(|| {
            PgError::internal(format!(
                "unexpected NULL in column {column} of a catalog query"
            ))
        })
    }

    /// A bytea column, copied out of Postgres' memory.
    pub fn bytes(&self, column: usize) -> Option<Vec<u8>> {
        self.get::<Vec<u8>>(column)
    }

    /// An xid8 column.
    pub fn xid8(&self, column: usize) -> Option<u64> {
        self.datum(column).map(|d| d.value() as u64)
    }

    /// A timestamptz column as microseconds since 1970.
    pub fn timestamptz(&self, column: usize) -> Option<i64> {
        self.datum(column)
            .map(|d| d.value() as i64 + super::PG_EPOCH_US)
    }

    /// A regclass, regrole or oid column.
    pub fn oid(&self, column: usize) -> Option<pg_sys::Oid> {
        self.datum(column)
            .map(|d| pg_sys::Oid::from(d.value() as u32))
    }
}

/// A saved plan, and the types its arguments were prepared with.
struct Plan {
    saved: pg_sys::SPIPlanPtr,
    types: Vec<pg_sys::Oid>,
}

thread_local! {
    static PLANS: RefCell<HashMap<&'static str, Plan>> = RefCell::new(HashMap::new());
}

/// Which snapshot a statement sees.
#[derive(Clone, Copy)]
pub enum View {
    /// Read-only under exactly this snapshot.
    Under(Snapshot),
    /// May write; a new snapshot as for any statement of this isolation level.
    Current,
}

impl View {
    /// Whether its snapshot was taken while this server was a standby.
    pub fn is_of_recovery(self) -> bool {
        matches!(self, Self::Under(snapshot) if snapshot.is_of_recovery())
    }

    /// The snapshot, and whether the statement only reads.
    fn for_spi(self) -> (pg_sys::Snapshot, bool) {
        match self {
            Self::Under(snapshot) => (snapshot.as_ptr(), true),
            Self::Current => (std::ptr::null_mut(), false),
        }
    }
}

/// Runs `sql` and calls `each` for every row. Returns the number of rows processed.
///
/// `sql` must name every relation and function with its schema; operators resolve in pg_catalog only,
/// since the search path is pinned for the call (a caller's operator would otherwise run as another role).
pub fn run(
    view: View,
    sql: &'static str,
    args: &[Arg],
    mut each: impl FnMut(&Row) -> Result<()>,
) -> Result<u64> {
    let _path = PinnedPath::enter();
    let _spi = Connection::open();
    let plan = plan(sql, args);
    let (mut values, nulls) = split(args);
    let (snapshot, read_only) = view.for_spi();
    // SAFETY: connected to SPI; the plan is kept; values and nulls have one entry per argument.
    let status = unsafe {
        pg_sys::SPI_execute_snapshot(
            plan,
            values.as_mut_ptr(),
            nulls.as_ptr(),
            snapshot,
            std::ptr::null_mut(),
            read_only,
            true,
            0,
        )
    };
    each_row(status, &mut each)
}

/// Calls `each` for the rows of the statement just run; their number, or that of the rows it touched.
fn each_row(status: i32, each: &mut dyn FnMut(&Row) -> Result<()>) -> Result<u64> {
    if status < 0 {
        return Err(PgError::internal(format!("SPI returned {status}")));
    }
    // SAFETY: SPI's globals describe the statement just run on this thread.
    let (processed, table) = unsafe { (pg_sys::SPI_processed, pg_sys::SPI_tuptable) };
    if !table.is_null() {
        // SAFETY: SPI_tuptable has `numvals` tuples until SPI_finish.
        let (count, vals, desc) = unsafe { ((*table).numvals, (*table).vals, (*table).tupdesc) };
        for i in 0..count as usize {
            // SAFETY: i < numvals.
            let tuple = unsafe { *vals.add(i) };
            each(&Row { tuple, desc })?;
        }
    }
    Ok(processed)
}

/// The rows, each mapped.
pub fn query<T>(
    view: View,
    sql: &'static str,
    args: &[Arg],
    mut map: impl FnMut(&Row) -> Result<T>,
) -> Result<Vec<T>> {
    let mut rows = Vec::new();
    run(view, sql, args, |row| {
        rows.push(map(row)?);
        Ok(())
    })?;
    Ok(rows)
}

/// The first row, mapped, if there is one.
pub fn first<T>(
    view: View,
    sql: &'static str,
    args: &[Arg],
    map: impl FnMut(&Row) -> Result<T>,
) -> Result<Option<T>> {
    Ok(query(view, sql, args, map)?.into_iter().next())
}

/// A statement without a result of interest; the number of rows it touched.
pub fn execute(sql: &'static str, args: &[Arg]) -> Result<u64> {
    run(View::Current, sql, args, |_| Ok(()))
}

/// A utility statement or other text made at run time: no plan is kept. Identifiers in it must have
/// gone through [`quote_ident`].
pub fn execute_text(sql: &str) -> Result<()> {
    let _path = PinnedPath::enter();
    let _spi = Connection::open();
    let text = CString::new(sql).map_err(|_| PgError::internal("NUL byte in SQL text"))?;
    // SAFETY: connected to SPI, text is NUL-terminated.
    let status = unsafe { pg_sys::SPI_execute(text.as_ptr(), false, 0) };
    if status < 0 {
        return Err(PgError::internal(format!("SPI returned {status}")));
    }
    Ok(())
}

/// The rows of a query whose text is made at run time: its plan is not kept. Identifiers and values in the text must
/// have gone through [`quote_ident`] and [`quote_literal`].
pub fn query_text<T>(
    view: View,
    sql: &str,
    args: &[Arg],
    mut map: impl FnMut(&Row) -> Result<T>,
) -> Result<Vec<T>> {
    let _path = PinnedPath::enter();
    let _spi = Connection::open();
    let text = CString::new(sql).map_err(|_| PgError::internal("NUL byte in SQL text"))?;
    let mut types: Vec<pg_sys::Oid> = args.iter().map(|a| a.0).collect();
    let (mut values, nulls) = split(args);
    let (snapshot, read_only) = view.for_spi();
    // SAFETY: connected to SPI; one type, value and null flag per argument; the plan goes with the connection.
    let status = unsafe {
        let plan = pg_sys::SPI_prepare(text.as_ptr(), types.len() as i32, types.as_mut_ptr());
        if plan.is_null() {
            return Err(PgError::internal("SPI refused a query"));
        }
        pg_sys::SPI_execute_snapshot(
            plan,
            values.as_mut_ptr(),
            nulls.as_ptr(),
            snapshot,
            std::ptr::null_mut(),
            read_only,
            true,
            0,
        )
    };
    let mut rows = Vec::new();
    each_row(status, &mut |row| {
        rows.push(map(row)?);
        Ok(())
    })?;
    Ok(rows)
}

/// The values of arguments, and which of them are NULL, as SPI wants them.
fn split(args: &[Arg]) -> (Vec<pg_sys::Datum>, Vec<std::ffi::c_char>) {
    args.iter()
        .map(|a| match a.1 {
            Some(value) => (value, b' ' as std::ffi::c_char),
            None => (pg_sys::Datum::from(0usize), b'n' as std::ffi::c_char),
        })
        .unzip()
}

/// An identifier as SQL text.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string literal as SQL text.
pub fn quote_literal(value: &str) -> String {
    if value.contains('\\') {
        format!(" E'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
    } else {
        format!("'{}'", value.replace('\'', "''"))
    }
}

fn plan(sql: &'static str, args: &[Arg]) -> pg_sys::SPIPlanPtr {
    let found = PLANS.with_borrow(|plans| {
        plans.get(sql).map(|plan| {
            // With another type a value would be taken for a pointer.
            assert!(
                plan.types.iter().copied().eq(args.iter().map(|a| a.0)),
                "a SQL text of ours is run with one list of argument types"
            );
            plan.saved
        })
    });
    if let Some(plan) = found {
        return plan;
    }
    let text = CString::new(sql).expect("SQL texts of ours have no NUL byte");
    let mut types: Vec<pg_sys::Oid> = args.iter().map(|a| a.0).collect();
    // SAFETY: connected to SPI; SPI_keepplan moves the plan to permanent memory.
    let saved = unsafe {
        let plan = pg_sys::SPI_prepare(text.as_ptr(), types.len() as i32, types.as_mut_ptr());
        assert!(!plan.is_null(), "SPI_prepare accepts the SQL texts of ours");
        pg_sys::SPI_keepplan(plan);
        plan
    };
    PLANS.with_borrow_mut(|plans| plans.insert(sql, Plan { saved, types }));
    saved
}

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether a statement of ours is being run.
pub fn is_inside() -> bool {
    DEPTH.get() > 0
}

/// SPI connection as a guard. While an error unwinds, the transaction's own cleanup closes it.
struct Connection;

impl Connection {
    fn open() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        // SAFETY: paired with SPI_finish in Drop; errors clean up at (sub)transaction end.
        unsafe { pg_sys::SPI_connect() };
        Self
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get().saturating_sub(1));
        if !std::thread::panicking() {
            // SAFETY: the connection opened in `open` is the innermost one.
            unsafe { pg_sys::SPI_finish() };
        }
    }
}

const PINNED: &CStr = c"pg_catalog, pg_temp";

/// `search_path = pg_catalog, pg_temp` for a while, restored also when an error unwinds; and `row_security = on`, since our
/// own tables are read through their policies, which the caller may have asked not to be used (as pg_dump does).
///
/// [`run`] pins it for itself; who runs several statements pins it once around them, since changing it makes
/// Postgres look its schemas up again.
pub struct PinnedPath {
    nest_level: Option<i32>,
}

impl PinnedPath {
    pub fn enter() -> Self {
        // SAFETY: the variables are the GUC machinery's; the path is a NUL-terminated string.
        let (is_path, is_row_security) = unsafe {
            let is_path = !pg_sys::namespace_search_path.is_null()
                && CStr::from_ptr(pg_sys::namespace_search_path) == PINNED;
            (is_path, pg_sys::row_security)
        };
        if is_path && is_row_security {
            return Self { nest_level: None };
        }
        // SAFETY: a GUC nest level is closed in Drop, or by the transaction's end on error.
        let nest_level = unsafe { pg_sys::NewGUCNestLevel() };
        if !is_path {
            save(c"search_path", PINNED);
        }
        if !is_row_security {
            save(c"row_security", c"on");
        }
        Self {
            nest_level: Some(nest_level),
        }
    }
}

impl Drop for PinnedPath {
    fn drop(&mut self) {
        if let Some(level) = self.nest_level
            && !std::thread::panicking()
        {
            // SAFETY: closes the level opened in `enter`, restoring the caller's path.
            unsafe { pg_sys::AtEOXact_GUC(true, level) };
        }
    }
}

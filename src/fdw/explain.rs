//! What EXPLAIN says of a scan: with VERBOSE what the engine evaluates and why the rest stays with Postgres, with
//! ANALYZE what was read. Counts only: names of objects are nobody's business.

use std::ffi::CString;

use pgrx::{pg_guard, pg_sys};
use rakam_engine::ScanMetrics;
use rakam_lake::cache::Counts;

use super::node;
use super::plan::ScanSpec;
use super::scan::ForeignScan;

#[pg_guard]
pub unsafe extern "C-unwind" fn scan(
    node: *mut pg_sys::ForeignScanState,
    es: *mut pg_sys::ExplainState,
) {
    // SAFETY: EXPLAIN's and the executor's own structures.
    unsafe {
        let plan: *mut pg_sys::ForeignScan = (*node).ss.ps.plan.cast();
        let spec = ScanSpec::of(plan);
        if (*es).verbose {
            conditions(plan, &spec, es);
        }
        if (*es).analyze
            && let Some(state) = (*node).fdw_state.cast::<ForeignScan>().as_ref()
        {
            counters(state, es);
        }
    }
}

unsafe fn conditions(
    plan: *mut pg_sys::ForeignScan,
    spec: &ScanSpec,
    es: *mut pg_sys::ExplainState,
) {
    // SAFETY: the deparse context is EXPLAIN's; the expressions are the plan's.
    unsafe {
        let context =
            pg_sys::set_deparse_context_plan((*es).deparse_cxt, plan.cast(), std::ptr::null_mut());
        let deparse = |expr: *mut pg_sys::Node| {
            node::text(pg_sys::deparse_expression(expr, context, true, false))
        };
        let relation = (*plan).scan.scanrelid as i32 - 1;
        let entry: *mut pg_sys::RangeTblEntry = pg_sys::list_nth((*es).rtable, relation).cast();
        let columns: Vec<String> = spec
            .columns
            .iter()
            .map(|attnum| node::text(pg_sys::get_attname((*entry).relid, *attnum, true)))
            .filter(|name| !name.is_empty())
            .collect();
        if !columns.is_empty() {
            texts(c"Engine Columns", &columns, es);
        }
        let pushed = node::pointers::<pg_sys::Node>((*plan).fdw_recheck_quals);
        if !pushed.is_empty() {
            let texts: Vec<String> = pushed.into_iter().map(deparse).collect();
            text(c"Engine Filter", &texts.join(" AND "), es);
        }
        if let Some(limit) = spec.limit {
            let params = node::pointers::<pg_sys::Node>((*plan).fdw_exprs);
            let shown = [Some(limit.count), limit.offset]
                .into_iter()
                .flatten()
                .filter_map(|index| params.get(index).map(|expr| deparse(*expr)))
                .collect::<Vec<_>>();
            text(c"Engine Limit", &shown.join(" + "), es);
        }
        let local: Vec<String> = node::pointers::<pg_sys::Node>((*plan).scan.plan.qual)
            .into_iter()
            .zip(&spec.local)
            .map(|(expr, reason)| format!("{} ({reason})", deparse(expr)))
            .collect();
        if !local.is_empty() {
            texts(c"Not Pushed Down", &local, es);
        }
    }
}

fn counters(state: &ForeignScan, es: *mut pg_sys::ExplainState) {
    let done = &state.done_so_far();
    let (skipped, metrics, counts) = (&done.skipped, &done.metrics, state.counts());
    if state.reads_files() {
        return files(metrics, es);
    }
    // SAFETY: EXPLAIN's own structure.
    if unsafe { (*es).format } == pg_sys::ExplainFormat::EXPLAIN_FORMAT_TEXT {
        let files = format!(
            "{} read, {} skipped by period, {} skipped by statistics",
            metrics.files_opened, skipped.files_by_period, skipped.files_by_statistics
        );
        let row_groups = format!(
            "{} read, {} skipped by statistics, {} skipped by bloom filter; {} pages skipped",
            metrics.row_groups_read,
            metrics.row_groups_pruned_by_stats,
            metrics.row_groups_pruned_by_bloom,
            metrics.pages_pruned
        );
        let inbox = format!(
            "{} entries read, {} events",
            done.inbox_rows, metrics.tail_rows
        );
        if skipped.files > 0 {
            text(c"Files", &files, es);
        }
        if metrics.files_opened > 0 {
            text(c"Row Groups", &row_groups, es);
            integer(c"Bytes Read", metrics.bytes_read as i64, es);
        }
        if counts != Counts::default() {
            let cache = format!(
                "{} blocks hit, {} bytes; {} blocks missed",
                counts.hits, counts.hit_bytes, counts.misses
            );
            text(c"Cache", &cache, es);
            let requests = format!("{}, {} bytes", counts.requests, counts.fetched_bytes);
            text(c"Storage Requests", &requests, es);
        }
        text(c"Chunks", &format!("{} read", metrics.chunks_read), es);
        text(c"Inbox", &inbox, es);
        if skipped.deleted_events > 0 {
            integer(c"Deleted Events Hidden", skipped.deleted_events as i64, es);
        }
        return;
    }
    for (label, value) in [
        (c"Files", skipped.files),
        (c"Files Read", metrics.files_opened as i64),
        (c"Files Skipped by Period", skipped.files_by_period),
        (c"Files Skipped by Statistics", skipped.files_by_statistics),
        (c"Row Groups Read", metrics.row_groups_read as i64),
        (
            c"Row Groups Skipped by Statistics",
            metrics.row_groups_pruned_by_stats as i64,
        ),
        (
            c"Row Groups Skipped by Bloom Filter",
            metrics.row_groups_pruned_by_bloom as i64,
        ),
        (c"Pages Skipped", metrics.pages_pruned as i64),
        (c"Bytes Read", metrics.bytes_read as i64),
        (c"Cache Blocks Hit", counts.hits as i64),
        (c"Cache Bytes Hit", counts.hit_bytes as i64),
        (c"Cache Blocks Missed", counts.misses as i64),
        (c"Storage Requests", counts.requests as i64),
        (c"Storage Bytes Fetched", counts.fetched_bytes as i64),
        (c"Chunks Read", metrics.chunks_read as i64),
        (c"Inbox Entries Read", done.inbox_rows as i64),
        (c"Inbox Events Read", metrics.tail_rows as i64),
        (c"Deleted Events Hidden", skipped.deleted_events as i64),
    ] {
        integer(label, value, es);
    }
}

/// Of attached files.
fn files(metrics: &ScanMetrics, es: *mut pg_sys::ExplainState) {
    for (label, value) in [
        (c"Files Read", metrics.files_opened),
        (c"Files Skipped by Folder", metrics.files_skipped),
        (c"Row Groups Read", metrics.row_groups_read),
        (
            c"Row Groups Skipped by Statistics",
            metrics.row_groups_pruned_by_stats,
        ),
        (c"Bytes Read", metrics.bytes_read),
    ] {
        // SAFETY: EXPLAIN's own structure.
        if value > 0 || unsafe { (*es).format } != pg_sys::ExplainFormat::EXPLAIN_FORMAT_TEXT {
            integer(label, value as i64, es);
        }
    }
}

fn text(label: &std::ffi::CStr, value: &str, es: *mut pg_sys::ExplainState) {
    let value = CString::new(value).unwrap_or_default();
    // SAFETY: NUL-terminated texts, copied into EXPLAIN's buffer.
    unsafe { pg_sys::ExplainPropertyText(label.as_ptr(), value.as_ptr(), es) };
}

fn texts(label: &std::ffi::CStr, values: &[String], es: *mut pg_sys::ExplainState) {
    let values: Vec<CString> = values
        .iter()
        .map(|value| CString::new(value.as_str()).unwrap_or_default())
        .collect();
    // SAFETY: a list of NUL-terminated texts that outlive the call, which copies them.
    unsafe {
        let list = values.iter().fold(std::ptr::null_mut(), |list, value| {
            pg_sys::lappend(list, value.as_ptr().cast_mut().cast())
        });
        pg_sys::ExplainPropertyList(label.as_ptr(), list, es);
    }
}

fn integer(label: &std::ffi::CStr, value: i64, es: *mut pg_sys::ExplainState) {
    // SAFETY: a NUL-terminated label, no unit; copied into EXPLAIN's buffer.
    unsafe { pg_sys::ExplainPropertyInteger(label.as_ptr(), std::ptr::null(), value, es) };
}

//! One row as a function's result: a function with OUT parameters, not a set.

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::{Datum, IntoDatum};
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};

use super::error::PgError;

/// The values of the OUT parameters, in order. The function's SQL declares their types.
#[derive(Default)]
pub struct Record(Vec<Option<pg_sys::Datum>>);

impl Record {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with<T: IntoDatum>(mut self, value: T) -> Self {
        self.0.push(value.into_datum());
        self
    }
}

// SAFETY: builds the tuple by the descriptor of the call.
unsafe impl BoxRet for Record {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        let mut desc: pg_sys::TupleDesc = std::ptr::null_mut();
        // SAFETY: the call's own fcinfo; the descriptor and the tuple live in the caller's memory context.
        unsafe {
            let class =
                pg_sys::get_call_result_type(fcinfo.as_mut_ptr(), std::ptr::null_mut(), &mut desc);
            if class != pg_sys::TypeFuncClass::TYPEFUNC_COMPOSITE
                || (*desc).natts as usize != self.0.len()
            {
                PgError::internal("result does not match the function's OUT parameters").raise();
            }
            pg_sys::BlessTupleDesc(desc);
            let mut nulls: Vec<bool> = self.0.iter().map(Option::is_none).collect();
            let mut values: Vec<pg_sys::Datum> = self
                .0
                .iter()
                .map(|value| value.unwrap_or(pg_sys::Datum::from(0usize)))
                .collect();
            let tuple = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            fcinfo.return_raw_datum(pg_sys::HeapTupleHeaderGetDatum((*tuple).t_data))
        }
    }
}

// SAFETY: names the type record; functions declare it by their OUT parameters.
unsafe impl SqlTranslatable for Record {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Record);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("record"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("record")));
}

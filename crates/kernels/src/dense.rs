//! Products of dense matrices on the host.

use gemm::Parallelism;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::fixed;
use crate::matrix::{Matrix, Read};
use crate::shared::Shared;

/// The number of rows, and of columns, of the result in a task.
const TASK: usize = 256;

/// Computes `c = a · b`, or `c += a · b` if `add`, on all threads.
///
/// The error is that of `f32` arithmetic, relative to the largest of each 256 values of a row of `a`
/// or a column of `b`. The bits of the result do not depend on the number of threads.
///
/// # Shapes
/// - `a`: `[m, k]`
/// - `b`: `[k, n]`
/// - `c`: `[m, n]`, in rows `c_stride` values apart
///
/// # Panics
/// If `c` is too short.
///
/// # Safety
/// `a` and `b` lie within their allocations, which nothing writes.
pub(crate) unsafe fn product(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: &mut [f32],
    c_stride: usize,
    add: bool,
) {
    assert!(m == 0 || n <= c_stride && (m - 1) * c_stride + n <= c.len());
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    if unsafe { fixed::dense::product([m, k, n], a, b, c, c_stride, add) } {
        return;
    }
    let (a, b, c) = (&Read(a), &Read(b), &Shared::new(c));
    let across = n.div_ceil(TASK);
    (0..m.div_ceil(TASK) * across)
        .into_par_iter()
        .for_each(|task| {
            let (row, column) = (task / across * TASK, task % across * TASK);
            let dims = [TASK.min(m - row), k, TASK.min(n - column)];
            // SAFETY: the part lies within `c`, checked above, and no other task uses it; the
            // caller promises the rest.
            unsafe {
                let c = c.offset(row * c_stride + column);
                multiply_add(dims, a.0.at(row, 0), b.0.at(0, column), c, c_stride, add);
            }
        });
}

/// Computes `c = a · b`, or `c += a · b` if `add`, on the calling thread.
///
/// The shapes are those of [`product`].
///
/// # Safety
/// The three matrices lie within their allocations, and nothing else uses `c`.
pub(crate) unsafe fn multiply_add(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: *mut f32,
    c_stride: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_stride as isize,
            add,
            a.data,
            a.column_stride,
            a.row_stride,
            b.data,
            b.column_stride,
            b.row_stride,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// With few rows and many, one panel and several, and `b` stored by rows or by columns.
    #[test]
    fn products_are_the_sums() {
        for ([m, k, n], (transposed, add)) in
            [[3, 5, 7], [11, 64, 64], [17, 300, 65], [530, 1300, 70]]
                .into_iter()
                .flat_map(|dims| {
                    [(false, false), (false, true), (true, false), (true, true)]
                        .map(|of| (dims, of))
                })
        {
            let mut random = Random::new(7);
            let (a, b) = (
                random.floats(m * k, -1.0, 1.0),
                random.floats(k * n, -1.0, 1.0),
            );
            let stride = n + 3;
            let before = random.floats(m * stride, -1.0, 1.0);
            let mut c = before.clone();
            let strides = if transposed { (1, k) } else { (n, 1) };
            let of_b = Matrix::new(b.as_ptr(), strides.0, strides.1);
            // SAFETY: the matrices have these sizes.
            unsafe {
                product(
                    [m, k, n],
                    Matrix::new(a.as_ptr(), k, 1),
                    of_b,
                    &mut c,
                    stride,
                    add,
                )
            };
            for (at, (&found, &before)) in c.iter().zip(&before).enumerate() {
                let (row, column) = (at / stride, at % stride);
                if column >= n {
                    assert_eq!(found, before, "a value outside of the product");
                    continue;
                }
                if row % 37 > 2 {
                    continue;
                }
                let term = |i: usize| {
                    f64::from(a[row * k + i]) * f64::from(b[i * strides.0 + column * strides.1])
                };
                let sum: f64 = (0..k).map(term).sum();
                let expected = sum + if add { f64::from(before) } else { 0.0 };
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= 2e-7 * (k as f64),
                    "{found} for {expected} at {row}, {column}"
                );
            }
        }
    }
}

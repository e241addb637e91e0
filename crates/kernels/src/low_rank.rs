//! The sum of a matrix and a product of two low-rank factors.

use burn::tensor::Tensor;

use crate::dtype::assert_same;

/// Adds a product of low-rank factors to a matrix: `weight + a · b`.
///
/// On the CPU in `f32`, it is one pass over the weight, and the product alone is not stored. On other
/// backends, in other dtypes and for tensors with gradients, the operations are burn's.
///
/// # Shapes
/// - `weight`: `[m, n]`
/// - `a`: `[m, r]`
/// - `b`: `[r, n]`
/// - result: `[m, n]`
///
/// # Panics
/// If the shapes are not these, or the dtypes differ.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::add_low_rank;
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::from_data([[1.0, 0.0], [0.0, 1.0]], &device);
/// let a = Tensor::<2>::from_data([[1.0], [2.0]], &device);
/// let b = Tensor::<2>::from_data([[3.0, 4.0]], &device);
/// let sum = add_low_rank(weight, a, b);
/// assert_eq!(sum.into_data().try_to_vec::<f32>().unwrap(), [4.0, 4.0, 6.0, 9.0]);
/// ```
pub fn add_low_rank(weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let ([m, n], [rank, of_b]) = (weight.dims(), b.dims());
    assert_eq!(a.dims(), [m, rank], "the shape of the left factor");
    assert_eq!(of_b, n, "the columns of the right factor");
    assert_same("the left factor", a.dtype(), "the weight", weight.dtype());
    assert_same("the right factor", b.dtype(), "the weight", weight.dtype());
    #[cfg(feature = "flex")]
    if let Some(sum) = flex::add_low_rank(&weight, &a, &b) {
        return sum;
    }
    weight + a.matmul(b)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::Flex;
    use burn::tensor::Tensor;
    use rayon::prelude::*;

    use crate::dense::multiply_add;
    use crate::host::{all_f32, contiguous, floats, tensor};
    use crate::matrix::{Matrix, Read};
    use crate::memory::zeroed;

    /// The number of rows in a task.
    const ROWS: usize = 128;

    pub(super) fn add_low_rank(
        weight: &Tensor<2>,
        a: &Tensor<2>,
        b: &Tensor<2>,
    ) -> Option<Tensor<2>> {
        let ([m, n], rank) = (weight.dims(), b.dims()[0]);
        let primitive = |tensor: &Tensor<2>| tensor.clone().try_into_primitive::<Flex>().ok();
        let (weight, a, b) = (primitive(weight)?, primitive(a)?, primitive(b)?);
        if !all_f32([&weight, &a, &b]) || m * n == 0 {
            return None;
        }
        let [weight, a, b] = [weight, a, b].map(contiguous);
        let weight = floats(&weight);
        let a = &Read(Matrix::new(floats(&a).as_ptr(), rank, 1));
        let b = &Read(Matrix::new(floats(&b).as_ptr(), n, 1));
        let mut sum = zeroed::<f32>(m * n);
        let parts = sum.par_chunks_mut(ROWS * n).enumerate();
        parts.for_each(|(part, sum)| {
            let first = part * ROWS;
            sum.copy_from_slice(&weight[first * n..][..sum.len()]);
            let dims = [sum.len() / n, rank, n];
            // SAFETY: `a` and `sum` have these rows and `b` its own; all outlive the call, and `sum`
            // belongs to this task.
            unsafe { multiply_add(dims, a.0.at(first, 0), b.0, sum.as_mut_ptr(), n, true) }
        });
        Some(Tensor::from_primitive::<Flex>(tensor(sum, [m, n])))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::Random;

    #[test]
    fn the_sum_is_that_of_the_product() {
        for [m, rank, n] in [[1, 1, 1], [130, 3, 70], [300, 16, 257]] {
            let device = Device::flex();
            let mut random = Random::new(3);
            let mut matrix = |rows: usize, columns: usize| {
                let values = random.floats(rows * columns, -1.0, 1.0);
                Tensor::<1>::from_floats(&values[..], &device).reshape([rows, columns])
            };
            let (w, a, b) = (matrix(m, n), matrix(m, rank), matrix(n, rank).transpose());
            let composed = w.clone() + a.clone().matmul(b.clone());
            let found = add_low_rank(w.clone(), a.clone(), b.clone());
            let error = (found - composed).abs().max().into_scalar::<f32>();
            assert!(error <= 4e-7 * rank as f32, "{error} at {m}, {rank}, {n}");
            // With gradients, the operations are burn's.
            let a = a.autodiff().require_grad();
            let gradients = add_low_rank(w.autodiff(), a.clone(), b.clone().autodiff())
                .sum()
                .backward();
            let found = a.grad(&gradients).expect("a gradient");
            let expected = b.sum_dim(1).transpose().expand([m, rank]);
            let error = (found - expected).abs().max().into_scalar::<f32>();
            assert!(error < 1e-4, "{error}");
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let device = Device::flex();
        let mut random = Random::new(5);
        let mut matrix = |rows: usize, columns: usize| {
            let values = random.floats(rows * columns, -1.0, 1.0);
            Tensor::<1>::from_floats(&values[..], &device).reshape([rows, columns])
        };
        let (w, a, b) = (matrix(400, 90), matrix(400, 7), matrix(7, 90));
        let on = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            let pool = pool.build().expect("threads");
            let sum = pool.install(|| add_low_rank(w.clone(), a.clone(), b.clone()));
            sum.into_data().try_into_vec::<f32>().expect("f32")
        };
        assert_eq!(on(1), on(3));
    }
}

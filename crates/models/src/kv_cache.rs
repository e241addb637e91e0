use burn::tensor::Tensor;

/// The keys and values of the tokens that one block has read.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    /// Tokens whose keys and values are stored.
    len: usize,
    /// Tokens to allocate memory for.
    pub(crate) capacity: usize,
}

impl KvCache {
    /// Appends keys and values, `[batch, seq, kv_heads, head_dim]`, and returns those of all tokens.
    pub(crate) fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let seq = keys.dims()[1];
        let (start, capacity) = (self.len, self.capacity);
        let append = |stored: &mut Option<Tensor<4>>, new: Tensor<4>| {
            let [batch, _, heads, dim] = new.dims();
            let empty = || {
                let options = (&new.device(), new.dtype());
                Tensor::zeros([batch, capacity, heads, dim], options)
            };
            let old = match stored.take() {
                Some(old) if old.dims()[1] == capacity => old,
                Some(old) => {
                    let old = old.narrow(1, 0, start);
                    empty().slice_assign([0..batch, 0..start], old)
                }
                None => empty(),
            };
            // Written in place, because this is the only handle on the tensor.
            let all = old.slice_assign([0..batch, start..start + seq], new);
            let read = all.clone().narrow(1, 0, start + seq);
            *stored = Some(all);
            read
        };
        let keys = append(&mut self.keys, keys);
        let values = append(&mut self.values, values);
        self.len += seq;
        (keys, values)
    }
}

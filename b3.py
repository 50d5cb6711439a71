import time, torch, numpy as np, sys
from rlkit2.agents import agent_class, make_config
from rlkit2.data import Batch
def run(eta, steps, n=2000, critics=5,lr=3e-4):
    g=torch.Generator().manual_seed(0)
    s=torch.randn(n,3,generator=g); a=torch.rand(n,2,generator=g)*2-1
    r=torch.sin(s[:,0])+a[:,0]*s[:,1]-.5*a[:,1]**2
    cfg=make_config("edac", hidden_sizes=(64,64), num_critics=critics, critic="ggd", critic_learning_rate=lr, eta=eta)
    ag=agent_class("edac")(cfg,3,2)
    t=time.time()
    for k in range(steps):
        i=torch.randint(n,(128,),generator=g)
        f=lambda x:x[i][None]
        ag.update(Batch(observations=f(s),actions=f(a),rewards=f(r),next_observations=f(s),terminations=torch.ones(1,128,dtype=torch.bool),truncations=torch.zeros(1,128,dtype=torch.bool)))
        if (k+1)%(steps//2)==0:
            u=ag.uncertainty(s,a)
            rm=lambda x: float(np.sqrt(np.mean(np.square(x))))
            print("eta",eta,k+1,"rmse q",rm(u.q_mean-r.numpy()),"rmse loc",rm(u.target_mean-r.numpy()),"alea",rm(u.aleatoric_sd), "median",np.median(u.aleatoric_sd),f"{time.time()-t:.0f}s",flush=True)
for e in (0.,1.,5.): run(e,3000)
